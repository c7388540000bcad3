"""What a scoring method is: a pure function of one kind of unit in one layer, with its source; and their registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jaxtyping import Float, Float64
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.statistics import Moments
from secateur.registry import Registry, unknown_name


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a method may look at, for one kind of unit in one layer.

    Attributes:
        kind: unit kind; ``layer`` its layer index.
        num_units: units there are, ``width`` input channels of the reading projection each.
        moments: sums over calibration tokens at the reading projection's input, ``num_units * width`` channels.
        linear_abs: per pre-activation output, the sum over calibration tokens of |output| per unit.
        load_weights: returns the weight slices of the units, one (units, elements) matrix per coupled slice; calling
            it may read the checkpoint, so only methods that need weights do.
        seed: for methods that draw.
    """

    kind: str
    layer: int
    num_units: int
    width: int
    moments: Moments
    linear_abs: Sequence[Float64[Tensor, " units"]]
    load_weights: Callable[[], Sequence[Float[Tensor, "units _elements"]]]
    seed: int


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
        needs: what it reads ("statistics", "weights", "nothing").
        cost: what it costs beyond the calibration pass.
        caveat: when it is a bad idea.
        source: author, year, arXiv id.
        control: whether it is a control rather than a method to use.
    """

    name: str
    function: ScoreFunction
    measures: str
    formula: str
    needs: str
    cost: str
    caveat: str
    source: str
    control: bool

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the method does not have, or values it does not take.

        Raises:
            ConfigError: unknown option or value; the known ones are listed.
        """
        signature = inspect.signature(self.function)
        parameters = {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
        hints = get_type_hints(self.function, include_extras=True)
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


def _listed_values(hint: Any) -> tuple[Any, ...]:
    """Return the values that an option's annotation lists: a Literal's, or the names in an annotated registry."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(hint.__metadata__[0]) if get_origin(hint) is Annotated else ()


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
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Return a decorator that registers a scoring function under ``name``; fields as in ``Method``."""

    def decorate(function: ScoreFunction) -> ScoreFunction:
        METHODS.add(name, Method(name, function, measures, formula, needs, cost, caveat, source, control))
        return function

    return decorate
