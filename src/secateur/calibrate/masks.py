"""Trained masks: gates on the units learn, by gradient descent under a budget, which units the text needs together.

Every unit has a gate z in 0..1 that multiplies what the reading projection receives of it. Gates are drawn anew at
every step from a hard-concrete distribution (Louizos, Welling and Kingma 2018, arXiv 1712.01312), which puts weight on
0 and on 1 exactly and can be differentiated between them:

    s = sigmoid((log u - log(1 - u) + log_alpha) / BETA), u uniform in 0..1
    z = clamp(s * (ZETA - GAMMA) + GAMMA, 0, 1)
    P(z > 0) = sigmoid(log_alpha - BETA * log(-GAMMA / ZETA))

Log_alpha is trained by Adam; the weights stay as they are, or adapters beside them learn from the same gradients of the
same blocks, as in ATP (2024, arXiv 2412.14426). The size is held by Lagrange multipliers, as in Wang
et al. 2020 (arXiv 1910.04732) and CoFi (Xia et al. 2022, arXiv 2204.00408): with r the expected share of the units'
parameters that goes and t the target, which rises in a straight line over the first part of the steps,

    minimise over log_alpha, maximise over l1 and l2:  objective + c * (l1 * (t - r) + l2 * (t - r)^2)

Where we differ. c makes the multipliers pure numbers: it is the usual length of the objective's gradient over that of
r's, so that at l1 = 1 both pull alike, whatever the objective's scale and the number of units. And l2 does not begin at
0: a few hundred steps are too few for multipliers that only grow by what is missing. An adapter sees what its layer
sees, gates included, where ATP gates the frozen weight alone: so nothing has to drive adapters to 0 where units go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.calibrate.gradients import block_loss, differentiated, require_differentiable
from secateur.calibrate.one_pass import require_linear
from secateur.errors import CheckpointError, ConfigError, CorpusError
from secateur.families.geometry import Geometry, UnitAxis
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.masks import LowRank, MaskSettings, MaskStatistics, MaskStep
from secateur.records.units import SiteKey
from secateur.stream.forward import run_logits

BETA = 2.0 / 3.0
GAMMA = -0.1
ZETA = 1.1
"""Temperature and stretch of the hard-concrete distribution, those of its authors."""

FIRST_LOG_ALPHA = 2.0
"""Where gates begin: open with probability 0.97, and wholly open with 0.6."""

RISING_SHARE = 0.5
"""Share of the steps over which the target rises from 0."""

FIRST_CURVE = 10.0
MULTIPLIER_RATE = 0.01
"""Where l2 begins, and the learning rate of both multipliers, by Adam."""

KEPT = 0.9
"""Share of the past in the running mean of the squared length of the objective's gradient."""

ADAPTER_NORM = 1.0
"""Length at which the gradient of all adapters together is cut off."""


@runtime_checkable
class Adapters(Protocol):
    """Low-rank changes of the weights of a model, which are in it for now."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained of them."""
        ...

    def without(self) -> AbstractContextManager[None]:
        """Let the model run as if they were not there, for as long as the context lasts."""
        ...

    def learned(self) -> LowRank:
        """Return what they add to which weights, on the CPU."""
        ...


Adapt = Callable[[Any], AbstractContextManager[Adapters]]
"""Puts adapters into a model for as long as a context lasts, and leaves the model as it was."""


def draw_gates(log_alpha: Float[Tensor, " units"], uniform: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Return hard-concrete gates, 0..1, for numbers drawn uniformly from the open interval 0..1."""
    concrete = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def open_probability(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Return the probability that a gate is not 0."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def unit_parameters(model: nn.Module, axis: UnitAxis, weight_layout: str) -> int:
    """Return how many parameters go with one unit of an axis."""
    count = 0
    for segment in axis.segments:
        module: Any = model.get_submodule(segment.module)
        outputs, inputs = module.weight.shape if weight_layout == "out_in" else reversed(module.weight.shape)
        if segment.side == "out":
            count += segment.width * (inputs + (getattr(module, "bias", None) is not None))
        else:
            count += segment.width * outputs
    return count


@contextmanager
def gated(model: nn.Module, geometry: Geometry, gates: Mapping[SiteKey, Float[Tensor, " units"]]) -> Iterator[None]:
    """Multiply what reading projections receive of every unit with its gate, for as long as the context lasts.

    Args:
        model: the dense model.
        geometry: of this model.
        gates: by (layer, unit kind), one number per unit.
    """
    with ExitStack() as stack:
        for (layer, kind), values in gates.items():
            axis = geometry.axes[kind][layer]
            hook = _Multiply(values.repeat_interleave(axis.reader_width))
            reader = model.get_submodule(axis.reader)
            stack.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass(frozen=True, slots=True)
class _Multiply:
    factors: Float[Tensor, " channels"]

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] * self.factors.to(args[0]), *args[1:]), kwargs
        name, values = next(iter(kwargs.items()))
        return args, {**kwargs, name: values * self.factors.to(values)}


class _Gates:
    """The log_alpha of all units in one vector, and what each unit costs."""

    def __init__(self, model: Any, axes: Sequence[UnitAxis], weight_layout: str, seed: int) -> None:
        weight = next(model.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.sites = [(axis.layer, axis.kind) for axis in axes]
        self.sizes = [axis.num_units for axis in axes]
        total = sum(self.sizes)
        costs = [unit_parameters(model, axis, weight_layout) for axis in axes]
        each = torch.tensor(costs, dtype=dtype).repeat_interleave(torch.tensor(self.sizes))
        self.shares = (each / each.sum()).to(weight.device)
        self.log_alpha = torch.full((total,), FIRST_LOG_ALPHA, dtype=dtype, device=weight.device, requires_grad=True)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> dict[SiteKey, Tensor]:
        """Return gates by site; the numbers behind them are drawn on the CPU, alike for every device."""
        uniform = torch.rand(len(self.log_alpha), generator=self.generator).clamp(1e-6, 1.0 - 1e-6)
        return self._by_site(draw_gates(self.log_alpha, uniform.to(self.log_alpha)))

    def removed(self) -> Float[Tensor, ""]:
        """Return the expected share of the parameters that goes."""
        return (self.shares * (1.0 - open_probability(self.log_alpha))).sum()

    def probabilities(self) -> dict[SiteKey, Tensor]:
        """Return by site how likely gates are open; float64 and on the CPU."""
        probabilities = open_probability(self.log_alpha.detach().double().cpu())
        return {site: values.clone() for site, values in self._by_site(probabilities).items()}

    def _by_site(self, values: Tensor) -> dict[SiteKey, Tensor]:
        return dict(zip(self.sites, torch.split(values, self.sizes), strict=True))


def learn_masks(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    kinds: Collection[str],
    settings: MaskSettings,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: Progress = silent,
    label: str = "masks",
    who: str = "the training of masks",
    adapt: Adapt | None = None,
) -> MaskStatistics:
    """Return how likely every unit's gate is open after training on ``blocks``, and what adapters learned beside it.

    One block runs at a time, in an order that is drawn anew for every round of the text. Besides the model, memory
    holds the activations of one block and its logits, twice for the ``kl`` objective.

    Args:
        model: a transformers causal language model, on its device, in float32, bfloat16 or float64; it stays as it is.
        blocks: packed calibration text.
        geometry: of this model.
        kinds: unit kinds that get gates.
        settings: how to train.
        seed: of the gates and of the order of blocks.
        max_tokens: whole blocks are taken from the start for as long as they have no more tokens than this, one at
            least; None for all.
        progress: told about finished steps.
        label: name of the work for ``progress``.
        who: who needs masks, for messages.
        adapt: puts in the adapters that are trained too, as ``settings.lora`` says; None where the weights stay.

    Raises:
        ConfigError: weights are quantised or in float16, or the kinds are parts of each other.
        FamilyError: the family cannot cut one of the kinds, or no linear layer reads it.
        CheckpointError: the objective is not finite.
        CorpusError: no token of the text is predicted.
    """
    geometry.require_cuttable(kinds)
    require_linear(kinds, "masks")
    require_differentiable(model, geometry, kinds, who)
    axes = [axis for kind in kinds for axis in geometry.axes[kind] if axis.num_units]
    _require_apart(axes, who)
    batches, num_tokens = _first_blocks(blocks, max_tokens, who)
    with differentiated(model), progress(label, settings.steps, "steps") as task:
        gates = _Gates(model, axes, geometry.family.weight_layout, seed)
        with adapt(model) if adapt is not None else nullcontext() as adapters:
            trainer = _Trainer(model, geometry, gates, settings, adapters)
            for index in _order(len(batches), settings.steps, seed):
                trainer.step(batches[index])
                task.advance(1)
            learned = adapters.learned() if adapters is not None else None
        removed = float(gates.removed().detach())
    return MaskStatistics(num_tokens, removed, gates.probabilities(), tuple(trainer.steps), learned)


def _require_apart(axes: Sequence[UnitAxis], who: str) -> None:
    readers: dict[str, str] = {}
    for axis in axes:
        other = readers.setdefault(axis.reader, axis.kind)
        if other != axis.kind:
            raise ConfigError(
                f"{who} puts one gate on every channel, and {other} and {axis.kind} are parts of each other. Choose "
                "one."
            )


def _first_blocks(blocks: TokenBlocks, max_tokens: int | None, who: str) -> tuple[list[BlockBatch], int]:
    """Return the blocks to train on, those without a predicted token left out, and the real tokens they hold."""
    chosen: list[BlockBatch] = []
    num_tokens = 0
    for batch in blocks.batches(1):
        if chosen and max_tokens is not None and num_tokens + batch.num_tokens > max_tokens:
            break
        if bool(batch.predicted.any()):
            chosen.append(batch)
            num_tokens += batch.num_tokens
    if not chosen:
        raise CorpusError(f"{who} needs a loss, and no calibration token is predicted: every document is one token.")
    return chosen, num_tokens


def _order(count: int, steps: int, seed: int) -> Iterator[int]:
    """Yield the place of the block of each step: every block once, in an order of its own, before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    places: list[int] = []
    for _ in range(steps):
        places = places or torch.randperm(count, generator=generator).tolist()
        yield places.pop()


class _Trainer:
    """Takes the steps; ``steps`` says how each went."""

    def __init__(
        self, model: Any, geometry: Geometry, gates: _Gates, settings: MaskSettings, adapters: Adapters | None
    ) -> None:
        self._model, self._geometry, self._gates, self._settings = model, geometry, gates, settings
        self._adapters = _AdapterTraining(adapters, settings) if adapters is not None else None
        self._multipliers = gates.log_alpha.new_tensor([0.0, FIRST_CURVE])
        self._slope_sq = torch.zeros_like(self._multipliers[0])
        self._lower = torch.optim.Adam([gates.log_alpha], lr=settings.learning_rate)
        self._raise = torch.optim.Adam([self._multipliers], lr=MULTIPLIER_RATE, maximize=True)
        self.steps: list[MaskStep] = []

    def step(self, batch: BlockBatch) -> None:
        """Draw gates, run one block forwards and backwards, and update gates and multipliers.

        Raises:
            CheckpointError: the objective is not finite.
        """
        target = self._target(len(self.steps) + 1)
        objective, removed = self._objective(batch), self._gates.removed()
        value = float(objective.detach())
        if not math.isfinite(value):
            raise CheckpointError(
                f"the objective of the masks is not finite at step {len(self.steps) + 1} (NaN or infinite). Check the "
                "checkpoint, or run with dtype: float32."
            )
        self._update(objective, removed, target)
        self.steps.append(MaskStep(value, float(removed.detach()), target))

    def _update(self, objective: Float[Tensor, ""], removed: Float[Tensor, ""], target: float) -> None:
        learned = self._adapters.parameters if self._adapters is not None else []
        slope, *slopes = torch.autograd.grad(objective, [self._gates.log_alpha, *learned])
        if self._adapters is not None:
            self._adapters.step(slopes)
        (growth,) = torch.autograd.grad(removed, self._gates.log_alpha)
        gap = target - removed.detach()
        self._slope_sq = self._slope_sq.lerp(slope.square().sum(), 1.0 - KEPT)
        usual = (self._slope_sq / (1.0 - KEPT ** (len(self.steps) + 1))).sqrt()
        price = (self._multipliers[0] + 2.0 * self._multipliers[1] * gap) * usual / growth.norm()
        self._gates.log_alpha.grad = slope - price * growth
        self._multipliers.grad = torch.stack([gap, gap.square()])
        self._lower.step()
        self._raise.step()

    def _target(self, step: int) -> float:
        return self._settings.target * min(1.0, step / max(1.0, RISING_SHARE * self._settings.steps))

    def _objective(self, batch: BlockBatch) -> Float[Tensor, ""]:
        gates = self._gates.draw()
        if self._settings.objective == "loss":
            with gated(self._model, self._geometry, gates):
                return block_loss(self._model, batch, self._geometry)
        with torch.no_grad(), self._adapters.without() if self._adapters is not None else nullcontext():
            dense = _predictions(self._model, batch, self._geometry)
        with gated(self._model, self._geometry, gates):
            ours = _predictions(self._model, batch, self._geometry)
        return nn.functional.kl_div(ours, dense, log_target=True, reduction="sum") / len(ours)


class _AdapterTraining:
    """Moves adapters along the objective's gradient, by steps that become smaller along half a cosine."""

    def __init__(self, adapters: Adapters, settings: MaskSettings) -> None:
        assert settings.lora is not None, "adapters come with their settings"
        self.parameters, self.without = adapters.parameters, adapters.without
        steps = settings.steps
        self._optimizer = torch.optim.Adam(self.parameters, lr=settings.lora.learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps))
        )

    def step(self, slopes: Sequence[Tensor]) -> None:
        for parameter, slope in zip(self.parameters, slopes, strict=True):
            parameter.grad = slope
        nn.utils.clip_grad_norm_(self.parameters, ADAPTER_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


def _predictions(model: Any, batch: BlockBatch, geometry: Geometry) -> Float[Tensor, "rows vocab"]:
    """Return the log-probabilities that predict the tokens whose loss counts; float32 or wider."""
    logits = run_logits(model, batch, geometry.family)[0]
    rows = logits[batch.predicted[0].nonzero()[:, 0].to(logits.device) - 1]
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
