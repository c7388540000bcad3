"""What a scoring method is: a pure function of one kind of unit in one layer, with its source; and their registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jaxtyping import Float, Float64
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from secateur.errors import ConfigError
from secateur.recipe import MaskLoraSpec
from secateur.records.gradients import UnitGradients
from secateur.records.impacts import UnitImpacts
from secateur.records.masks import AdapterSettings, MaskSettings
from secateur.records.plan import Plan
from secateur.records.routing import RoutingSums
from secateur.records.statistics import Moments, SequenceSums
from secateur.records.units import BLOCK_KINDS, EXPERT, FUSED_KINDS, LAYER_UNIT_KINDS
from secateur.registry import Registry, unknown_name

CHANNEL_KINDS: tuple[str, ...] = tuple(kind for kind in LAYER_UNIT_KINDS if kind != EXPERT)
"""Kinds whose units are channels that some projection reads."""
LINEAR_KINDS: tuple[str, ...] = tuple(kind for kind in LAYER_UNIT_KINDS if kind not in FUSED_KINDS)
"""Those of them that a linear layer reads, where Gram matrices, gradients, impacts and masks can be taken."""


def _no_impacts() -> UnitImpacts:
    raise ConfigError(
        "these statistics do not say what single documents need; take that with the calibration (impacts=True), or use "
        "another method."
    )


def _no_masks() -> Tensor:
    raise ConfigError(
        "these statistics hold no trained masks. Use a recipe (secateur run, or secateur.run), which trains them, or "
        "another method."
    )


def _no_routing() -> RoutingSums:
    raise ConfigError("these statistics do not say what experts do. Calibrate again, or use another method.")


def _no_router() -> Tensor:
    raise ConfigError("these units have no router. Use another method.")


def _no_bucket(name: str) -> Evidence:
    raise ConfigError(f"these statistics hold nothing of a bucket {name!r} alone. Calibrate on it, or use other text.")


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a method may look at, for one kind of unit in one layer.

    Attributes:
        kind: unit kind; ``layer`` its layer index.
        num_units: units there are, ``width`` input channels of the reading projection each.
        moments: sums over calibration tokens at the reading projection's input, ``num_units * width`` channels.
        sequences: sums over calibration blocks at the same place.
        linear_abs: per pre-activation output, the sum over calibration tokens of |output| per unit.
        load_weights: returns the weight slices of the units, one (units, elements) matrix per coupled slice; calling
            it may read the checkpoint, so only methods that need weights do.
        load_reader: returns the weight of the reading projection, one column per channel, whatever the checkpoint's
            layout; it may read the checkpoint.
        load_gram: returns the Gram matrix H = mean over calibration tokens of x xT at the reading projection's input,
            symmetric; raises ConfigError where the calibration took none.
        load_gradients: returns sums over calibration blocks of products with the loss's gradient, per unit; raises
            ConfigError where no gradient pass was made.
        seed: for methods that draw.
        cosine: for whole layers and sub-layers only (None for other kinds): mean over calibration tokens of the cosine
            between the residual stream before and after; these have ``num_units`` 1 and nothing to look at but this and
            removal_loss.
        removal_loss: for whole layers and sub-layers, where the method's ``measure`` asks for it: what is measured once
            the block is gone, together with those that went before it.
        load_masks: returns the probability that each unit's trained gate is open; raises ConfigError where no masks
            were trained.
        of_bucket: returns the evidence of one text alone.
        buckets: names of the texts behind this evidence.
        load_routing: for experts only: returns sums over the tokens that were sent to each. ``moments`` and
            ``sequences`` of experts are empty.
        load_router: for experts only: returns the router's weight, one row per expert; it may read the checkpoint.
    """

    kind: str
    layer: int
    num_units: int
    width: int
    moments: Moments
    sequences: SequenceSums
    linear_abs: Sequence[Float64[Tensor, " units"]]
    load_weights: Callable[[], Sequence[Float[Tensor, "units _elements"]]]
    load_reader: Callable[[], Float[Tensor, "out channels"]]
    load_gram: Callable[[], Float64[Tensor, "channels channels"]]
    load_gradients: Callable[[], UnitGradients]
    seed: int
    cosine: float | None = None
    removal_loss: float | None = None
    load_impacts: Callable[[], UnitImpacts] = _no_impacts
    load_masks: Callable[[], Float64[Tensor, " units"]] = _no_masks
    of_bucket: Callable[[str], Evidence] = _no_bucket
    buckets: tuple[str, ...] = ()
    load_routing: Callable[[], RoutingSums] = _no_routing
    load_router: Callable[[], Float[Tensor, "experts hidden"]] = _no_router


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method's notes are made of, once a plan was made with its scores.

    Attributes:
        options: the method's, those that were given.
        scores: by unit kind, one vector per layer.
        plan: what was made of them.
        fingerprints: of the calibration text, by bucket.
    """

    options: Mapping[str, Any]
    scores: Mapping[str, Sequence[Float64[Tensor, " _units"]]]
    plan: Plan
    fingerprints: Mapping[str, str]


Merged = tuple[tuple[int, float], ...]
"""Experts that become one, with their weights in it; the first one stays."""

MergeFunction = Callable[..., Sequence[Merged]]
"""(evidence, experts that stay, groups of the router, keyword-only options) -> what each of those is made of."""

NotesFunction = Callable[[Outcome], Sequence[str]]
"""What a person should know of a plan that a method made."""


class _BucketName:
    """Marks an option that names buckets of text."""


BUCKET = _BucketName()
"""Annotates an option whose value is the name of a bucket, or holds names of buckets."""


RemovalMeasure = Literal["", "loss", "js"]
"""What a method of whole blocks has measured; empty: nothing."""

ScoreFunction = Callable[..., Tensor]
"""(evidence, keyword-only options) -> one float64 importance per unit, higher = keep."""


@dataclass(frozen=True, slots=True)
class Method:
    """A registered scoring method.

    Attributes:
        name: what recipes call it.
        function: the scoring function; its keyword-only parameters are the method's options.
        measures: what it measures, one sentence.
        formula: the formula, in plain text.
        needs: what it reads: "statistics", "Gram matrices", "weights", "gradients", "impacts", "masks", "measured
            removals", joined by "and"; or "nothing".
        cost: what it costs beyond the calibration pass.
        caveat: when it is a bad idea.
        source: author, year, arXiv id.
        control: whether it is a control rather than a method to use.
        gram: whether it reads Gram matrices, which the calibration takes only when asked.
        gradient: whether it reads gradients, which take a backward pass of their own.
        output_gradient: whether it reads those at the outputs of the reading projections too.
        kinds: unit kinds that it can score.
        measure: what must be measured by removing blocks one after another; empty: nothing. ``loss``: the loss on
            calibration text; ``js``: the Jensen-Shannon divergence of the next-token distributions to the dense model.
        gradient_sketch: whether it compares the gradients of two texts, which takes projections of them.
        impact: whether it reads what single documents say, which the calibration collects only when asked.
        contrast: whether it says how much more one text needs a unit than another, so that it reads the same of both,
            and a unit that neither needs is not the lowest.
        notes: what to say of a plan that was made with it.
        mask: whether it reads trained masks; its options are then those of ``MaskSettings``.
        merge: for methods of experts that merge those that go into those that stay: says which ones, once a budget says
            how many stay. Its options are those of ``function``.
    """

    name: str
    function: ScoreFunction
    measures: str
    formula: str
    needs: str
    cost: str
    caveat: str
    source: str
    control: bool = False
    gram: bool = False
    gradient: bool = False
    output_gradient: bool = False
    kinds: tuple[str, ...] = CHANNEL_KINDS
    measure: RemovalMeasure = ""
    gradient_sketch: bool = False
    impact: bool = False
    contrast: bool = False
    notes: NotesFunction | None = None
    mask: bool = False
    merge: MergeFunction | None = None

    def require_kinds(self, kinds: Iterable[str]) -> None:
        """Raise ConfigError for the first unit kind that the method cannot score; methods that score all are listed."""
        wanted = list(kinds)
        missing = next((kind for kind in wanted if kind not in self.kinds), None)
        if missing is None:
            return
        able = [name for name, method in METHODS.items() if set(wanted) <= set(method.kinds)]
        key = "prune.depth_method" if missing in BLOCK_KINDS else "prune.method"
        advice = f"Set {key} to one of: {', '.join(able)}"
        if all(METHODS[name].control for name in able):
            advice = (
                f"Only controls score {' and '.join(wanted)} at once; cut one kind, then prune the result for the other"
            )
        raise ConfigError(
            f"method {self.name} scores {', '.join(self.kinds)} and cannot score units of kind {missing}. {advice}."
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the method does not have, or values it does not take.

        Raises:
            ConfigError: unknown option or value; the known ones are listed.
        """
        parameters, hints = self._parameters(), get_type_hints(self.function, include_extras=True)
        for key, value in options.items():
            if key not in parameters:
                if not parameters:
                    raise ConfigError(f"method {self.name} has no options; got {key!r}. Remove prune.options.")
                raise ConfigError(unknown_name(f"option of method {self.name}", key, parameters))
            choices = _listed_values(hints[key])
            if choices and value not in choices:
                raise ConfigError(
                    unknown_name(f"value for option {key} of method {self.name}", value, map(str, choices))
                )
            if not choices:
                self._check_type(key, value, hints[key])

    def _check_type(self, key: str, value: Any, hint: Any) -> None:
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            told = "; or ".join(dict.fromkeys(item["msg"].removeprefix("Input ") for item in error.errors()))
            raise ConfigError(f"option {key} of method {self.name} {told}; got {value!r}.") from None

    def reads_grams(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method reads Gram matrices with these options, itself or through a method they name."""
        return any(method.gram for method in self._involved(options))

    def reads_gradients(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method reads gradients with these options, itself or through a method they name."""
        return any(method.gradient for method in self._involved(options))

    def reads_output_gradients(self, options: Mapping[str, Any]) -> bool:
        """Return whether these are to be taken at the outputs of the reading projections too."""
        return any(method.output_gradient for method in self._involved(options))

    def reads_gradient_sketches(self, options: Mapping[str, Any]) -> bool:
        """Return whether projections of the gradients are to be taken too."""
        return any(method.gradient_sketch for method in self._involved(options))

    def reads_impacts(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method reads impacts with these options, itself or through a method they name."""
        return any(method.impact for method in self._involved(options))

    def mask_settings(self, options: Mapping[str, Any]) -> MaskSettings | None:
        """Return how the masks that the method reads are trained: by its options, or by the defaults of one they name.

        None where no masks are read.
        """
        own, *others = self._involved(options)
        for method, given in ((own, options), *((other, {}) for other in others)):
            if method.mask:
                values = method._values(given)
                return MaskSettings(**{**values, "lora": _adapter_settings(values.get("lora", False))})
        return None

    def named_buckets(self, options: Mapping[str, Any]) -> list[str]:
        """Return the buckets that the method looks at one by one, by its options or those of a method they name."""
        own, *others = self._involved(options)
        found = [*own._buckets(options), *(name for method in others for name in method._buckets({}))]
        return list(dict.fromkeys(found))

    def _buckets(self, options: Mapping[str, Any]) -> list[str]:
        hints, values = get_type_hints(self.function, include_extras=True), self._values(options)
        return [name for key, value in values.items() if _names_buckets(hints[key]) for name in _strings(value)]

    def _values(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: options.get(name, parameter.default) for name, parameter in self._parameters().items()}

    def _involved(self, options: Mapping[str, Any]) -> list[Method]:
        """Return this method and those that its options name."""
        hints = get_type_hints(self.function, include_extras=True)
        values = self._values(options)
        return [self, *(METHODS[value] for name, value in values.items() if _registry(hints[name]) is METHODS)]

    def _parameters(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _adapter_settings(value: bool | Mapping[str, Any]) -> AdapterSettings | None:
    """Return what an option that was checked says of adapters; True takes the defaults."""
    if value is False:
        return None
    spec = MaskLoraSpec() if value is True else MaskLoraSpec.model_validate(value)
    targets = spec.targets if isinstance(spec.targets, str) else tuple(spec.targets)
    return AdapterSettings(spec.rank, spec.alpha, targets, spec.learning_rate)


def _listed_values(hint: Any) -> tuple[Any, ...]:
    """Return the values that an option's annotation lists: a Literal's, a flag's, or the names in a registry."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return (False, True) if hint is bool else tuple(_registry(hint) or ())


def _registry(hint: Any) -> Registry[Any] | None:
    """Return the registry whose names an annotated option takes, if it names one."""
    extras = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Registry)), None)


def _names_buckets(hint: Any) -> bool:
    return get_origin(hint) is Annotated and BUCKET in hint.__metadata__


def _strings(value: Any) -> list[str]:
    """Return every string in a value, at any depth; of mappings the values."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return [name for item in inner for name in _strings(item)]


METHODS: Registry[Method] = Registry("method")


def register(
    name: str,
    *,
    measures: str,
    formula: str,
    needs: str,
    cost: str,
    caveat: str,
    source: str,
    control: bool = False,
    gram: bool = False,
    gradient: bool = False,
    output_gradient: bool = False,
    kinds: tuple[str, ...] | None = None,
    measure: RemovalMeasure = "",
    gradient_sketch: bool = False,
    impact: bool = False,
    contrast: bool = False,
    notes: NotesFunction | None = None,
    mask: bool = False,
    merge: MergeFunction | None = None,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Return a decorator that registers a scoring function under ``name``; fields as in ``Method``.

    By default ``kinds`` are those whose units are channels; where the method reads what only linear layers of their own
    can give, those that have such a layer.
    """
    able = kinds or (LINEAR_KINDS if gram or gradient or impact or mask else CHANNEL_KINDS)

    def decorate(function: ScoreFunction) -> ScoreFunction:
        words = (measures, formula, needs, cost, caveat, source)
        method = Method(
            name,
            function,
            *words,
            control,
            gram,
            gradient,
            output_gradient,
            able,
            measure,
            gradient_sketch,
            impact,
            contrast,
            notes,
            mask,
            merge,
        )
        METHODS.add(name, method)
        return function

    return decorate
