"""What a recipe makes a run do, stage by stage, as operations, bytes and seconds: the passes are those of ``pipeline``.

Formulas are in ``costs``; here it is said how often each is paid, with how much text. Nothing is loaded or run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from secateur.estimate import costs
from secateur.estimate.size import ModelSize, Site, narrowed
from secateur.estimate.texts import Amount, TextAmounts
from secateur.pipeline.grams import judging_tokens
from secateur.recipe import UNIT_BUDGETS, PruneSpec, Recipe, RecoverSpec
from secateur.records.estimate import Rates, StageEstimate
from secateur.records.masks import AdapterSettings
from secateur.records.units import ATTENTION, EXPERT, LAYER, SUBLAYER_OF
from secateur.score import METHODS

SAVE_S = 2.0
"""Seconds that saving a model takes besides its weights: configuration, tokenizer and its comparison."""
PLAN_S = 0.5
"""Seconds that a plan takes besides what its method computes."""
SIZES_TRIED = 10
"""Models that a bound on the loss tries at most."""
REPORT_S = 5.0
"""Seconds for the report and its page, most of them for the charts' library."""
DENSE, ALLOCATOR = "dense weights", "held by the allocator"
"""Terms of the memory that other terms rest on."""
DOCUMENTS_BYTES_PER_TOKEN = 24
"""Memory of text that is read for a split: its characters, tokens, and their places."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What sizes and times rest on besides the recipe.

    Attributes:
        size: of the dense model.
        amounts: how much text there is.
        rates: of the machine.
        compute: bytes per parameter while computing.
        training: bytes per number of a training's products: 2 where it computes in 16 bits.
        on_gpu: whether a GPU computes.
    """

    size: ModelSize
    amounts: TextAmounts
    rates: Rates
    compute: int = 4
    training: int = 4
    on_gpu: bool = False


@dataclass(slots=True)
class Cost:
    """Seconds and memory of one stage while they are added up."""

    what: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: int = 0
    temporary: int = 0
    at_most: bool = False

    def read(self, amount: Amount) -> None:
        """Note that an amount of text is read, which may be less than was said."""
        self.at_most |= amount.at_most


def kept_shares(recipe: Recipe, size: ModelSize) -> tuple[dict[str, float], bool]:
    """Return which share of each part of the model stays, and whether it may be less.

    Where the size is only found during the run (a bound on the loss, a threshold, a rule for token ids), everything
    stays, and less may.
    """
    prune = recipe.prune
    shares: dict[str, float] = {}
    unknown = False
    spec = prune.vocabulary_spec()
    vocabulary_alone = not prune.layer_kinds()
    if spec is not None and spec.size is not None:
        shares["embedding"] = shares["head"] = min(1.0, spec.size / size.vocab)
    elif spec is not None:
        unknown = not (vocabulary_alone and prune.budget is not None)
    budget = prune.budget
    if budget is None:
        return shares, unknown
    for kind in budget.unit_kinds():
        part = _part_of(kind)
        shares[part] = shares.get(part, 1.0) * (1.0 - getattr(budget, UNIT_BUDGETS[kind]))
    removed = _removed_parameters(prune, size)
    if removed is None:
        return shares, unknown or not budget.unit_kinds()
    parts = ["embedding", "head"] if vocabulary_alone else _parts_of(prune)
    there = size.by_part()
    room = sum(there[part] for part in parts)
    share = max(0.0, 1.0 - removed / max(room, 1))
    return {**shares, **dict.fromkeys(parts, share)}, unknown


def _part_of(kind: str) -> str:
    """Return the part of the model that shrinks with units of a kind; whole layers are a part of their own."""
    if kind == LAYER:
        return "layers"
    return "attention" if SUBLAYER_OF.get(kind, kind) == ATTENTION else "ffn"


def _removed_parameters(prune: PruneSpec, size: ModelSize) -> float | None:
    assert prune.budget is not None, "asked for where there is a budget"
    if prune.budget.parameters is not None:
        return prune.budget.parameters * size.parameters
    if prune.budget.bytes is not None:
        return size.parameters - prune.budget.bytes / size.stored
    return None


def _parts_of(prune: PruneSpec) -> list[str]:
    found = {_part_of(kind) for kind in prune.layer_kinds()}
    return sorted(found - {"layers"} | ({"attention", "ffn"} if "layers" in found else set()))


class Stages:
    """Predicts the stages of one recipe.

    Args:
        recipe: what is asked.
        setting: sizes and rates.
    """

    def __init__(self, recipe: Recipe, setting: Setting) -> None:
        self.recipe, self.setting = recipe, setting
        self.size, self.rates = setting.size, setting.rates
        self.block = recipe.calibrate.block_size
        self._stages: list[StageEstimate] = []
        self._is_loaded = False

    def predict(self) -> list[StageEstimate]:
        """Return the stages in the order in which they run."""
        self._start()
        for name in self._calibrated:
            self._answers(name)
        for name in self._calibrated:
            self._calibrate(name)
        for name in self._calibrated:
            self._more_of(name)
        self._plan()
        self._shrink()
        self._recover()
        self._evaluate()
        self._exports()
        return self._stages

    # -- what is asked -----------------------------------------------------------------------------------------------

    @cached_property
    def _calibrated(self) -> list[str]:
        if not self.recipe.prune.layer_kinds():
            return []
        return list(self.recipe.calibrate.buckets or self.recipe.buckets())

    @cached_property
    def _deciding(self) -> list[str]:
        prune = self.recipe.prune
        return list(prune.mix or prune.buckets or self.recipe.domain)

    @cached_property
    def _shares(self) -> tuple[dict[str, float], bool]:
        return kept_shares(self.recipe, self.size)

    @cached_property
    def small(self) -> ModelSize:
        """The sizes of the smaller model, at most."""
        return narrowed(self.size, self._shares[0])

    @cached_property
    def _compared(self) -> list[str]:
        """Buckets that the method looks at one by one."""
        prune = self.recipe.prune
        if not prune.width_kinds():
            return []
        named = METHODS[prune.method].named_buckets(prune.options)
        return list(dict.fromkeys([*named, *(self._deciding if prune.combine == "union" else [])]))

    @cached_property
    def _gram_sites(self) -> list[Site]:
        prune = self.recipe.prune
        measured = prune.reconstruct != "none" and prune.allocation in ("knapsack", "search")
        needed = prune.reconstruct == "dense" or measured or METHODS[prune.method].reads_grams(prune.options)
        return self.size.sites(prune.width_kinds()) if needed else []

    def _kept_share(self) -> float:
        shares = self._shares[0]
        return min(shares.get("ffn", 1.0), shares.get("attention", 1.0))

    def _amount(self, name: str, split: str, limit: int | None) -> Amount:
        return self.setting.amounts.amount(name, split, limit)  # type: ignore[arg-type]

    # -- pieces that many stages share -------------------------------------------------------------------------------

    def _add(self, name: str, cost: Cost, *, unpredicted: bool = False) -> None:
        memory, host = dict(cost.memory), dict(cost.host)
        needed = sum(size for what, size in memory.items() if what != DENSE)
        memory[ALLOCATOR] = round(costs.ALLOCATOR_SHARE * needed)
        base = {"program and libraries": self.rates.baseline_bytes}
        if self.setting.on_gpu:
            host = {**base, **host}
        else:
            memory, host = {**base, **memory, **host}, {}
        seconds = None if unpredicted else cost.seconds
        self._stages.append(
            StageEstimate(
                name, "; ".join(cost.what), seconds, memory, host, cost.disk, cost.temporary, at_most=cost.at_most
            )
        )

    def _with_dense(self) -> Cost:
        """Return a cost that begins with the dense model in memory; the first stage that needs it loads it."""
        weights = costs.weights_bytes(self.size.parameters, self.setting.compute)
        cost = Cost(memory={DENSE: weights})
        if not self._is_loaded:
            stored = costs.weights_bytes(self.size.parameters, self.size.stored)
            cost.seconds = stored / self.rates.read + weights / self.rates.load
            cost.what.append(f"{self.size.parameters:,} weights loaded")
            if stored != weights:  # weights that are kept as they are stored are the file itself, mapped into memory
                cost.host["weights file in memory"] = stored
            self._is_loaded = True
        return cost

    def _forward_s(self, size: ModelSize, tokens: int, rate: float | None = None) -> float:
        whole = costs.in_blocks(tokens, self.block)
        return costs.layers_flops(size, whole, self.block) / (rate or self.rates.forward)

    def _head_s(self, size: ModelSize, tokens: int) -> float:
        return costs.head_flops(size, costs.in_blocks(tokens, self.block)) / self.rates.head

    def _at_once(self, batch: int, tokens: int | None = None) -> int:
        """Return the tokens of one batch; there may be less text than a batch holds."""
        batches = batch * self.block
        return batches if tokens is None else min(batches, costs.in_blocks(max(tokens, 1), self.block))

    def _activations(self, size: ModelSize, at_once: int) -> dict[str, int]:
        return {"activations": costs.activation_bytes(size, at_once, self.setting.compute)}

    def _logits(self, size: ModelSize, at_once: int, copies: int = 1) -> dict[str, int]:
        return {"logits": costs.logits_bytes(size, at_once, self.setting.compute, copies)}

    def _save(self, cost: Cost, size: ModelSize) -> None:
        """Add saving a model, reading it back and comparing, in the stored precision."""
        stored = costs.weights_bytes(size.parameters, self.size.stored)
        cost.seconds += SAVE_S + stored / self.rates.write + 2 * stored / self.rates.load
        cost.disk += stored
        if self.size.stored != self.setting.compute:  # else it is the weights that were cut, and the dense ones
            cost.memory["smaller model in the stored precision"] = stored
        cost.memory["smaller model, read back"] = stored

    # -- start -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        cost = Cost()
        amounts, num_bytes, most = self.setting.amounts, 0, 0
        for name in self.recipe.buckets():
            passes = 1 + (name in self._calibrated)
            num_bytes += passes * (amounts.file_bytes(name) or 0)
            for split, limit in (
                ("calibration", self.recipe.calibrate.max_tokens),
                ("test", self.recipe.evaluate.max_tokens),
            ):
                amount = self._amount(name, split, limit)
                cost.read(amount)
                most += amount.tokens
        if self.recipe.prune.vocabulary_spec() is not None:
            num_bytes += sum(amounts.file_bytes(name) or 0 for name in self._deciding)
            cost.what.append("token ids counted")
        cost.host["text"] = most * DOCUMENTS_BYTES_PER_TOKEN
        cost.seconds = self.rates.start_s + num_bytes / self.rates.tokenize
        cost.what.insert(0, f"libraries, {num_bytes / 1e6:,.0f} MB of text")
        self._add("start and tokenize", cost)

    def _written_s(self, size: ModelSize, tokens: int, batch: int) -> float:
        """Return the seconds for writing tokens one after another: every step goes through all active weights."""
        active = sum(layer.active for layer in size.layers) + size.hidden * size.vocab
        steps = math.ceil(tokens / batch)
        return steps * active * self.setting.compute / self.rates.decode

    def _answers(self, name: str) -> None:
        asked = self.recipe.buckets()[name].responses
        if asked is None:
            return
        amount = self._amount(name, "calibration", self.recipe.calibrate.max_tokens)
        cost = self._with_dense()
        cost.read(Amount(0, True))
        cost.seconds += self._written_s(self.size, amount.tokens, asked.batch_size)
        positions = asked.batch_size * (self.block + asked.max_new_tokens)
        cache = 2 * positions * self.size.kv * self.size.num_layers * self.setting.compute
        cost.memory |= {"keys and values": cache, **self._activations(self.size, positions)}
        cost.what.append(f"{amount.tokens:,} tokens written by the dense model")
        self._add(f"answer:{name}", cost)

    # -- calibration -------------------------------------------------------------------------------------------------

    def _calibrate(self, name: str) -> None:
        batch = self.recipe.calibrate.batch_size
        amount = self._amount(name, "calibration", self.recipe.calibrate.max_tokens)
        cost = self._with_dense()
        cost.read(amount)
        at_once = self._at_once(batch, amount.tokens)
        cost.seconds += self._forward_s(self.size, amount.tokens, self.rates.calibrate)
        cost.memory |= self._activations(self.size, at_once)
        cost.what.append(f"{amount.tokens:,} tokens forwards")
        prune = self.recipe.prune
        if self._gram_sites and name in (*self._deciding, *self._compared):
            self._sum_grams(cost, amount.tokens)
        if prune.width_kinds() and METHODS[prune.method].reads_impacts(prune.options):
            cost.what.append("what single documents say, in the same pass")
        self._add(f"calibrate:{name}", cost)

    def _sum_grams(self, cost: Cost, tokens: int) -> None:
        sites = self._gram_sites
        cost.seconds += costs.gram_flops(sites, tokens) / self.rates.gram
        finished = costs.gram_bytes(sites)
        cost.seconds += finished / self.rates.write
        # Each is finished while the sums of the others are still there, and all of them are written at the end.
        cost.host["Gram matrices"] = finished
        if self.setting.on_gpu:
            cost.memory["sums of Gram matrices"] = costs.gram_sum_bytes(sites)
        cost.disk += finished
        cost.what.append(f"{len(sites)} Gram matrices")

    def _more_of(self, name: str) -> None:
        """Add what is taken of a bucket in passes of their own: Gram matrices that judge, gradients, masks."""
        recipe, prune = self.recipe, self.recipe.prune
        calibrate, method = recipe.calibrate, METHODS[prune.method]
        if prune.reconstruct == "dense" and self._gram_sites and name in self._deciding:
            amount = self._amount(name, "validation", judging_tokens(calibrate.max_tokens, self.block))
            cost = self._with_dense()
            cost.read(amount)
            cost.seconds += self._forward_s(self.size, amount.tokens)
            cost.memory |= self._activations(self.size, self._at_once(calibrate.batch_size, amount.tokens))
            cost.what.append(f"{amount.tokens:,} tokens forwards")
            self._sum_grams(cost, amount.tokens)
            self._add(f"gram:{name}:validation", cost)
        kinds = prune.width_kinds()
        if not kinds or name not in (*self._deciding, *self._compared):
            return
        most = min(calibrate.gradient_tokens, calibrate.max_tokens or calibrate.gradient_tokens)
        amount = self._amount(name, "calibration", most)
        if method.reads_gradients(prune.options):
            self._gradients(name, amount)
        settings = method.mask_settings(prune.options)
        if settings is not None:
            self._masks(name, settings.steps, settings.objective, settings.lora)

    def _backward(self, cost: Cost) -> None:
        """Add what one block holds on its way back: what layers keep, and its logits, their logarithms and slopes."""
        cost.memory["activations kept"] = costs.saved_bytes(self.size, self.block, self.setting.compute)
        cost.memory |= self._logits(self.size, self.block, 3)

    def _gradients(self, name: str, amount: Amount) -> None:
        cost = self._with_dense()
        cost.read(amount)
        whole = costs.in_blocks(amount.tokens, self.block)
        cost.seconds += costs.gradient_flops(self.size, whole, self.block) / self.rates.gradients
        cost.seconds += 3 * costs.head_flops(self.size, whole) / self.rates.head
        self._backward(cost)
        sites = self.size.sites(self.recipe.prune.width_kinds())
        widest = max((site.width * site.out for site in sites), default=0)
        cost.memory["gradient of one projection"] = 3 * widest * costs.FLOAT
        options = self.recipe.prune.options
        if METHODS[self.recipe.prune.method].reads_output_gradients(options):
            held = sum(site.out**2 for site in sites) * costs.FLOAT
            cost.memory["sums over output gradients"] = held
            cost.disk += held
        cost.what.append(f"{amount.tokens:,} tokens forwards and backwards")
        self._add(f"gradients:{name}", cost)

    def _masks(self, name: str, steps: int, objective: str, lora: AdapterSettings | None) -> None:
        cost = self._with_dense()
        tokens = steps * self.block
        passes = 2.0 + (objective == "kl")
        rate = self.rates.forward
        cost.seconds += passes * costs.layers_flops(self.size, tokens, self.block) / rate
        cost.seconds += (passes + 1) * costs.head_flops(self.size, tokens) / self.rates.head
        self._backward(cost)
        if objective == "kl":
            cost.memory |= self._logits(self.size, self.block, 5)
        if lora is not None:
            trained = costs.lora_parameters(self.size, lora.rank)
            cost.seconds += steps * trained / self.rates.optimizer
            cost.memory["adapters and their optimizer"] = trained * costs.FLOAT + costs.optimizer_bytes(trained)
            cost.disk += trained * costs.FLOAT
        cost.what.append(f"{steps:,} steps of one block{'' if lora is None else ', adapters too'}")
        self._add(f"masks:{name}", cost)

    # -- plan --------------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        prune = self.recipe.prune
        if prune.layer_kinds() and prune.allocation in ("knapsack", "search"):
            self._search()
        if prune.block_kinds() and METHODS[prune.depth_method].measure:
            self._depth()
        cost = self._with_dense() if prune.layer_kinds() else Cost()
        cost.seconds += PLAN_S
        cost.what.append("scores and what stays")
        if METHODS[prune.method].reads_grams(prune.options):
            sites = self._gram_sites
            cost.seconds += costs.inverse_flops(sites) / self.rates.solve
            cost.host["equations of one site"] = max((6 * site.width**2 * costs.DOUBLE for site in sites), default=0)
        tried = prune.guard.steps + 1 if prune.combine == "guard" else 0
        sized = self._deciding if tried else list(self.recipe.loss_bounds())
        tried = tried or (SIZES_TRIED if sized else 0)
        if tried:
            cost.at_most = True
            cost.what.append(f"up to {tried} models measured on validation text")
            amounts = [self._amount(name, "validation", self.recipe.evaluate.max_tokens) for name in sized]
            tokens = sum(amount.tokens for amount in amounts)
            self._fit(cost, times=tried)
            self._measured(cost, self.size, tokens, times=tried + 1)
            cost.memory["parts of the smaller model"] = costs.weights_bytes(self.small.parameters, self.setting.compute)
        self._add("plan", cost)

    def _measured(self, cost: Cost, size: ModelSize, tokens: int, times: int = 1) -> None:
        """Add measuring the loss of a model on some text."""
        cost.seconds += times * (self._forward_s(size, tokens) + self._head_s(size, tokens))
        at_once = self._at_once(self.recipe.evaluate.batch_size)
        cost.memory |= {**self._activations(size, at_once), **self._logits(size, at_once)}

    def _search(self) -> None:
        """Add the measured allocation: single cuts, each from its layer on, and whole candidates of a search."""
        prune, search = self.recipe.prune, self.recipe.prune.search
        layers = self.size.num_layers
        whole = "layer" in prune.layer_kinds()
        kinds = prune.width_kinds()
        blocks = [kind for kind in prune.block_kinds() if kind != "layer"]
        cuts = layers * (len(search.levels) * len(kinds) + len(blocks) + whole)
        tokens = search.tokens * len(self._deciding)
        one, head = self._forward_s(self.size, tokens), self._head_s(self.size, tokens)
        cost = self._with_dense()
        at_once = self.block
        cost.memory |= {**self._activations(self.size, at_once), **self._logits(self.size, at_once, 4)}
        if prune.shape == "uniform":
            cost.what.append("uniform shapes measured")
            cost.seconds += 8 * (one + head)
            cost.at_most = True
            self._add("search:shapes", cost)
            return
        cost.seconds += cuts * (one / 2 + head)
        if self._gram_sites:
            cost.seconds += (
                cuts * costs.fit_flops(self._gram_sites, 0.5) / max(len(self._gram_sites), 1) / self.rates.solve
            )
        cost.what.append(f"{cuts:,} single cuts on {tokens:,} tokens")
        self._add("search:cuts", cost)
        if prune.allocation == "search":
            more = self._with_dense()
            more.memory |= dict(list(cost.memory.items())[1:])
            each = search.offspring / 4 + 5
            more.seconds += search.generations * each * (one + head)
            if search.time_limit is not None:
                more.seconds = min(more.seconds, search.time_limit)
            more.at_most = True
            more.what.append(f"{search.generations} generations of {search.offspring}")
            self._add("search:evolve", more)

    def _depth(self) -> None:
        """Add removals of blocks that are measured one after another: every block that is left, each time one goes."""
        prune = self.recipe.prune
        tokens = prune.search.tokens * len(self._deciding)
        layers, budget = self.size.num_layers, prune.budget
        given = [getattr(budget, key) for key in ("layers", "attention", "ffn", "parameters")]
        share = max((value for value in given if value is not None), default=0.0)
        rounds = max(1, math.ceil(share * layers))
        tried = sum(layers - gone for gone in range(rounds))
        cost = self._with_dense()
        cost.seconds += tried * (self._forward_s(self.size, tokens) / 2 + self._head_s(self.size, tokens))
        cost.memory |= {**self._activations(self.size, self.block), **self._logits(self.size, self.block, 4)}
        cost.what.append(f"{tried:,} removals on {tokens:,} tokens")
        self._add("search:depth", cost)

    # -- shrink ------------------------------------------------------------------------------------------------------

    def _fit(self, cost: Cost, times: int = 1) -> None:
        """Add what reconstructing a model takes."""
        prune = self.recipe.prune
        sites = self.size.sites(prune.width_kinds())
        if prune.reconstruct != "none" and EXPERT in prune.width_kinds():
            self._fit_experts(cost, times)
        if prune.reconstruct == "none" or not sites:
            return
        share = self._kept_share()
        cost.seconds += times * costs.fit_flops(sites, share) / self.rates.solve
        cost.host["equations of one projection"] = costs.fit_bytes(sites, share)
        if prune.reconstruct == "dense":
            cost.seconds += times * 4 * costs.gram_bytes(sites) / self.rates.read
            cost.what.append(f"{len(sites)} projections fitted")
            return
        calibrate, found = self.recipe.calibrate, self._fitting_amounts()
        tokens = sum(amount.tokens for amount in found)
        cost.at_most |= any(amount.at_most for amount in found)
        both = self.size.sites(("ffn_channel", "gqa_group"))
        # The dense layer once; the twin for each sub-layer's sums; the twin again to move on.
        cost.seconds += (
            times * (1.0 + 0.75 * len({site.kind for site in both}) + 1.0) * self._forward_s(self.size, tokens)
        )
        cost.seconds += times * 2 * costs.gram_flops(both, tokens) / self.rates.gram
        streams = costs.hidden_bytes(self.size, costs.in_blocks(tokens, self.block), self.setting.compute, 4)
        widest = max(layer.parameters for layer in self.size.layers)
        cost.memory |= {
            "residual streams of the text": streams,
            "a layer's twin": costs.weights_bytes(widest, self.setting.compute),
            **self._activations(self.size, self._at_once(calibrate.batch_size, tokens)),
        }
        cost.what.append(f"{len(sites)} projections fitted on the pruned stream of {tokens:,} tokens")

    def _fit_experts(self, cost: Cost, times: int) -> None:
        """Add what fitting the scales of experts takes: they run twice, by the dense router and the pruned one."""
        amounts = self._fitting_amounts()
        tokens = sum(amount.tokens for amount in amounts)
        passes = 2.0 if self.recipe.prune.reconstruct == "dense" else 4.0  # on two streams
        cost.at_most |= any(amount.at_most for amount in amounts)
        cost.seconds += times * passes * self._forward_s(self.size, tokens)
        cost.memory |= self._activations(self.size, self._at_once(self.recipe.calibrate.batch_size, tokens))
        cost.what.append(f"scales of experts fitted on {tokens:,} tokens")

    def _fitting_amounts(self) -> list[Amount]:
        """Return the text that fits are made on and judged by, where they run text."""
        calibrate = self.recipe.calibrate
        limits = {"calibration": calibrate.max_tokens, "validation": judging_tokens(calibrate.max_tokens, self.block)}
        return [self._amount(name, split, limit) for name in self._deciding for split, limit in limits.items()]

    def _cut(self, cost: Cost) -> None:
        """Add the weights that a cut makes: parts that lose something are copied, the others stay the dense model's."""
        parts, shares = self.size.by_part(), self._shares[0]
        copied = sum(round(count * shares[part]) for part, count in parts.items() if shares.get(part, 1.0) < 1.0)
        cost.memory["weights that were cut"] = costs.weights_bytes(copied, self.setting.compute)
        cost.seconds += costs.weights_bytes(self.small.parameters, self.setting.compute) / self.rates.load

    def _shrink(self) -> None:
        cost = self._with_dense()
        cost.at_most = self._shares[1]
        self._fit(cost)
        self._cut(cost)
        self._save(cost, self.small)
        cost.what.append(f"{self.small.parameters:,} weights cut, saved, read back and compared")
        self._add("shrink", cost)

    # -- recovery ----------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        spec = self.recipe.recover
        if spec is None:
            return
        if spec.needs_finetuned or "dense" in spec.baselines:
            self._train("dense_finetuned", self.size, spec)
        for number in range(spec.rounds):
            name = "recovered" if spec.rounds == 1 else f"recovered (round {number + 1} of {spec.rounds})"
            self._train(name, self.small, spec)
        if "random" in spec.baselines:
            self._train("random_recovered", self.small, spec)

    def _train(self, name: str, size: ModelSize, spec: RecoverSpec) -> None:
        domains = self.recipe.trained_domains()
        share = None if spec.max_tokens is None else max(1, spec.max_tokens // len(domains))
        found = [self._amount(domain, "calibration", share) for domain in domains]
        tokens = sum(amount.tokens for amount in found)
        if spec.replay:
            tokens += max(self.block, round(tokens * spec.replay / (1 - spec.replay)))
        cost = self._with_dense()
        cost.at_most = True
        whole = round(costs.in_blocks(tokens, self.block) * spec.epochs)
        blocks = math.ceil(tokens / self.block)
        steps = max(1, math.ceil(spec.epochs * math.ceil(blocks / spec.batch_size) / spec.accumulation))
        taught = spec.method == "distill" and name != "dense_finetuned"
        cost.seconds += self._training_s(size, whole, spec, taught=taught)
        trained = size.parameters if spec.lora is None else costs.lora_parameters(self.size, spec.lora.rank)
        cost.seconds += steps * trained / self.rates.optimizer
        self._training_memory(cost, size, spec, trained, taught=taught, tokens=tokens)
        probes = 1 + min(spec.evaluations, steps)
        self._watch(cost, size, spec, probes, trained)
        if spec.responses is not None:
            cost.seconds += self._written_s(self.size, tokens, spec.responses.batch_size)
            cost.what.append("answers written by the dense model")
        if taught and spec.distill.cached_logits:
            cost.disk += tokens * (spec.distill.cached_logits * 6 + 4)
        self._save(cost, size)
        for term in ("smaller model in the stored precision", "smaller model, read back"):
            cost.memory.pop(term, None)  # the optimizer is gone by then, and was larger
        if name != "recovered":
            cost.temporary, cost.disk = cost.temporary + cost.disk, 0
        cost.what.insert(0, f"{tokens:,} tokens x {spec.epochs:g}, {steps:,} steps, {probes} evaluations")
        self._add(f"recover:{name}", cost)

    def _training_s(self, size: ModelSize, tokens: int, spec: RecoverSpec, *, taught: bool) -> float:
        again = 4 / 3 if spec.gradient_checkpointing else 1.0
        layers = again * costs.gradient_flops(size, tokens, self.block)
        head = 3 * costs.head_flops(size, tokens)
        if taught:
            passes = 1.0 if not spec.distill.cached_logits else 1.0 / spec.epochs
            layers += passes * costs.layers_flops(self.size, tokens, self.block)
            head += passes * costs.head_flops(self.size, tokens)
        return layers / self.rates.training + head / self.rates.training_head

    def _training_memory(
        self, cost: Cost, size: ModelSize, spec: RecoverSpec, trained: int, *, taught: bool, tokens: int
    ) -> None:
        at_once, narrow = self._at_once(spec.batch_size, tokens), self.setting.training
        cost.memory["trained weights, in float32"] = costs.weights_bytes(size.parameters, costs.FLOAT)
        cost.memory["gradients and optimizer"] = costs.optimizer_bytes(trained)
        if narrow < costs.FLOAT:
            cost.memory["weights in 16 bits"] = costs.weights_bytes(size.parameters, narrow)
        cost.memory["activations kept"] = costs.saved_bytes(
            size, at_once, narrow, checkpointing=spec.gradient_checkpointing
        )
        teacher = 1 if taught and not spec.distill.cached_logits else 0
        cost.memory["logits"] = costs.logits_bytes(size, at_once, narrow, 2) + teacher * costs.logits_bytes(
            self.size, at_once, narrow
        )

    def _watch(self, cost: Cost, size: ModelSize, spec: RecoverSpec, probes: int, trained: int) -> None:
        """Add the evaluations of a training and its checkpoints."""
        watched = [*self.recipe.domain, *(["general"] if self.recipe.general else [])]
        tokens = sum(self._amount(name, "validation", spec.evaluation_tokens).tokens for name in watched)
        cost.seconds += probes * (self._forward_s(size, tokens) + self._head_s(size, tokens))
        cost.seconds += self._forward_s(self.size, tokens) + self._head_s(self.size, tokens)
        kept = trained * costs.CHECKPOINT_BYTES
        cost.seconds += probes * kept / self.rates.write
        cost.temporary += min(costs.CHECKPOINTS, probes) * kept

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        evaluate, spec = self.recipe.evaluate, self.recipe.recover
        self._row("dense", self.size, loaded=True)
        if spec is not None and "dense" in spec.baselines:
            self._row("dense_finetuned", self.size)
        self._row("pruned", self.small)
        if spec is not None:
            self._row("recovered", self.small)
        for control in evaluate.controls:
            self._row(control, self.small, control=True)
        if spec is not None and "random" in spec.baselines:
            self._row("random_recovered", self.small)
        if self.recipe.prune.vocabulary_spec() is not None:
            self._row("vocabulary", self.size, loaded=True)
        if evaluate.speed is not None:
            self._speed()
        if evaluate.generations is not None:
            asked = evaluate.generations
            cost = self._with_dense()
            prompts = asked.num * len(self.recipe.domain)
            tokens = 2 * prompts * asked.max_new_tokens
            cost.seconds += self._written_s(self.size, tokens, 8) + self._written_s(self.small, tokens, 8)
            cost.memory["smaller weights"] = costs.weights_bytes(self.small.parameters, self.setting.compute)
            cost.what.append(f"{2 * prompts} answers each by two models")
            self._add("generations", cost)
        if evaluate.tasks is not None:
            cost = self._with_dense()
            cost.memory["smaller weights"] = costs.weights_bytes(self.small.parameters, self.setting.compute)
            cost.memory |= self._logits(self.size, evaluate.tasks.batch_size * self.block)
            cost.what.append(f"{', '.join(evaluate.tasks.names)}: their text is not known before they are fetched")
            self._add("tasks", cost, unpredicted=True)
        self._add("report", Cost(what=["tables and page"], seconds=REPORT_S, memory=self._with_dense().memory))

    def _test(self) -> Amount:
        found = [self._amount(name, "test", self.recipe.evaluate.max_tokens) for name in self.recipe.buckets()]
        return Amount(sum(amount.tokens for amount in found), any(amount.at_most for amount in found))

    def _row(self, name: str, size: ModelSize, *, loaded: bool = False, control: bool = False) -> None:
        cost, test = self._with_dense(), self._test()
        cost.read(test)
        self._measured(cost, size, test.tokens)
        cost.what.append(f"{test.tokens:,} tokens in {len(self.recipe.buckets())} texts")
        for asked in self.recipe.evaluate.choices.values():
            items = asked.max_items or 1000
            tokens = items * 4 * self.block // 4
            cost.seconds += self._forward_s(size, tokens) + self._head_s(size, tokens // 8)
            cost.at_most = True
            cost.what.append(f"up to {items:,} questions")
        if control:
            self._fit(cost)
            self._cut(cost)
        elif not loaded:
            weights = costs.weights_bytes(size.parameters, self.setting.compute)
            cost.memory["measured weights"] = weights
            cost.seconds += costs.weights_bytes(size.parameters, self.size.stored) / self.rates.read
            cost.seconds += weights / self.rates.load
        self._add(f"evaluate:{name}", cost)

    def _speed(self) -> None:
        asked = self.recipe.evaluate.speed
        assert asked is not None, "only called where speed is asked for"
        cost = self._with_dense()
        rounds = asked.rounds + 2
        for size in (self.size, self.small):
            for prompt in asked.prompt_lengths:
                for batch in asked.batch_sizes:
                    read = costs.layers_flops(size, batch * prompt, prompt) / self.rates.forward
                    cost.seconds += rounds * (read + self._written_s(size, batch * asked.new_tokens, batch))
        cost.memory["smaller weights"] = costs.weights_bytes(self.small.parameters, self.setting.compute)
        cost.what.append(f"{asked.rounds} rounds of two models, and a process of its own for each one's memory")
        self._add("speed", cost)

    # -- exports -----------------------------------------------------------------------------------------------------

    def _exports(self) -> None:
        for export in self.recipe.export:
            cost = Cost()
            itemsize = _EXPORTED.get((export.quantize or "F16").upper(), 2.0)
            if export.to != "gguf":
                itemsize = float(self.size.stored)
            written = round(self.small.parameters * itemsize)
            cost.disk = written
            wide = costs.weights_bytes(self.small.parameters, costs.FLOAT)
            cost.memory |= {"smaller weights": wide, "exported model": written}
            cost.seconds = SAVE_S + written / self.rates.write + 2 * wide / self.rates.load
            cost.what.append(f"{export.to}{' ' + export.quantize if export.quantize else ''}, written and compared")
            self._add(f"export:{export.to}", cost)


_EXPORTED: Mapping[str, float] = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 1.07, "Q4_0": 0.57, "Q4_K_M": 0.61}
"""Bytes per parameter of some types of GGUF files."""
