"""Blocks go in the order that measuring all of them with whole forward passes gives, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from secateur.allocate import Request, choose_blocks, make_plan
from secateur.allocate.blocks import Block, BlockCut, Order
from secateur.errors import CheckpointError
from secateur.evaluate.output_change import OutputChange
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.pipeline.depth import DepthStage, Meters
from secateur.progress import silent
from secateur.records.scores import Scores
from secateur.records.units import ATTENTION, FFN, LAYER
from secateur.store.artifacts import read_json
from secateur.store.run_folder import RunFolder
from secateur.stream.forward import run_logits
from secateur.stream.sources import LoadedLayers
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import geometry_of, pico_model

LLAMA = families()["llama"]
Removal = Literal["loss", "js"]


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny float64 model of four layers."""
    return pico_model(LLAMA, num_hidden_layers=4)


@pytest.fixture(scope="module")
def geometry(model: Any) -> Geometry:
    """Its geometry."""
    return geometry_of(model, LLAMA)


def stage(model: Any, folder: Path, measure: Removal = "js", *, reused: list[str] | None = None) -> DepthStage:
    """Return a stage over two buckets of hand-made text, one of which counts three times."""
    geometry = geometry_of(model, LLAMA)
    source, blocks = LoadedLayers(model, geometry), hand_made_blocks()

    def load() -> Meters:
        whole = OutputChange(source, blocks, batch_size=2, measure=measure)
        other = OutputChange(source, other_blocks(), measure=measure)
        return Meters({"law": whole, "medical": other}, {"law": 0.25, "medical": 0.75})

    found = [] if reused is None else reused
    run = RunFolder.open(folder)
    run.describe(model="pico")
    return DepthStage(geometry, dict(model.named_parameters()).get, load, run, "key", silent, found)


def other_blocks() -> HandMadeBlocks:
    """Return a text of its own."""
    return hand_made_blocks(seed=1)


@contextmanager
def without(model: Any, gone: Sequence[Block]) -> Iterator[None]:
    """Take blocks out by hooks: sub-layers add nothing, layers return what enters them."""
    with ExitStack() as stack:
        for kind, layer in gone:
            block = model.model.layers[layer]
            if kind == LAYER:
                handle = block.register_forward_hook(lambda module, args, output: args[0])
            elif kind == FFN:
                handle = block.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            else:
                handle = block.self_attn.register_forward_hook(
                    lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
                )
            stack.callback(handle.remove)
        yield


def brute_force(model: Any, gone: Sequence[Block], measure: Removal) -> float:
    """Measure with whole forward passes and explicit probabilities."""
    total = 0.0
    for blocks, weight in ((hand_made_blocks(), 0.25), (other_blocks(), 0.75)):
        values: list[Tensor] = []
        for batch in blocks.batches(1):
            wanted = batch.predicted[:, 1:]
            p = run_logits(model, batch, LLAMA)[:, :-1][wanted].softmax(-1)
            with without(model, gone):
                q = run_logits(model, batch, LLAMA)[:, :-1][wanted].softmax(-1)
            m, targets = (p + q) / 2, batch.input_ids[:, 1:][wanted]
            js = (p * (p / m).log() + q * (q / m).log()).sum(-1) / 2
            values.append(js if measure == "js" else -q.gather(1, targets[:, None])[:, 0].log())
        total += weight * float(torch.cat(values).mean())
    return total


def all_that_may(kinds: Sequence[str], geometry: Geometry, count: int) -> Callable[[Order], BlockCut]:
    """Return what takes the first ``count`` blocks of some kinds."""

    def choose(order: Order) -> BlockCut:
        cut = BlockCut(geometry)
        cut.take_first(order(cut, kinds), count)
        return cut

    return choose


@pytest.mark.parametrize("measure", ["loss", "js"])
@pytest.mark.parametrize("kinds", [(ATTENTION, FFN), (LAYER,)])
@torch.no_grad()
def test_the_order_is_that_of_a_greedy_search_with_whole_forward_passes(
    model: Any, geometry: Geometry, tmp_path: Path, kinds: tuple[str, ...], measure: Removal
) -> None:
    """Every number too, and those of the blocks that stay; also where the numbers fall from one removal to the next."""
    count = 3
    losses = stage(model, tmp_path, measure).removal_losses(kinds, all_that_may(kinds, geometry, count))
    cut, gone, last = BlockCut(geometry), list[Block](), -1.0
    for _ in range(count):
        measured = {block: brute_force(model, [*gone, block], measure) for block in cut.candidates(kinds)}
        best = min(measured, key=lambda block: measured[block])
        last = max(last, measured[best])
        assert losses[best[0]][best[1]] == pytest.approx(last, rel=1e-9)
        gone.append(best)
        cut.take(best)
    removed = [losses[kind][layer] for kind, layer in gone]
    assert removed == sorted(set(removed)), "no two are equal, so the order can be read off"
    for block, value in measured.items():
        if block not in gone:
            assert losses[block[0]][block[1]] == pytest.approx(max(value, last), rel=1e-9)
    stay = [losses[kind][layer] for kind in kinds for layer in range(4) if (kind, layer) not in gone]
    assert min(stay) > removed[-1]


@pytest.mark.parametrize(
    ("kinds", "budget"),
    [
        ((ATTENTION, FFN), {"parameters": 0.35}),
        ((ATTENTION, FFN), {"attention": 0.5, "ffn": 0.25}),
        ((LAYER, ATTENTION, FFN), {"parameters": 0.5}),
        ((LAYER,), {"layers": 0.5}),
    ],
)
def test_a_plan_from_the_scores_takes_the_very_blocks_that_were_taken_out(
    model: Any, geometry: Geometry, tmp_path: Path, kinds: tuple[str, ...], budget: dict[str, float]
) -> None:
    """The numbers compare as they are, whatever the size of the blocks."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    request, cuts = Request(budget, shape="uneven"), list[BlockCut]()

    def choose(order: Order) -> BlockCut:
        cuts.append(choose_blocks(kinds, geometry, shapes, request, order))
        return cuts[-1]

    losses = stage(model, tmp_path).removal_losses(kinds, choose)
    values = {
        kind: [torch.tensor([value], dtype=torch.float64) for value in per_layer] for kind, per_layer in losses.items()
    }
    plan = make_plan(Scores("", {}, (), values, cumulative=True), geometry, shapes, request)
    assert not cuts[0].is_empty
    whole = [layer for layer in range(4) if layer not in cuts[0].left(LAYER)]
    assert list(plan.removed_layers) == whole
    for kind in (ATTENTION, FFN):
        gone = [layer for layer in range(4) if layer not in cuts[0].left(kind) and layer not in whole]
        assert list(plan.removed_sublayers(kind)) == gone


def test_a_stopped_run_goes_on_and_other_budgets_measure_only_new_rounds(
    model: Any, geometry: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same numbers, and at the end nothing is measured at all."""
    kinds = (ATTENTION, FFN)
    whole = stage(model, tmp_path / "whole").removal_losses(kinds, all_that_may(kinds, geometry, 3))
    alone, rounds = OutputChange.alone, list[int]()

    def counted(self: OutputChange, *args: Any, **kwargs: Any) -> Any:
        if len(rounds) == 3:
            raise KeyboardInterrupt
        rounds.append(1)
        return alone(self, *args, **kwargs)

    folder = tmp_path / "stopped"
    monkeypatch.setattr(OutputChange, "alone", counted)  # two texts, so the second round is cut off
    with pytest.raises(KeyboardInterrupt):
        stage(model, folder).removal_losses(kinds, all_that_may(kinds, geometry, 3))
    assert len(read_json(folder / "search" / "depth.json")["rounds"]) == 1
    rounds.clear()
    one_more = stage(model, folder).removal_losses(kinds, all_that_may(kinds, geometry, 2))
    assert len(rounds) == 2
    monkeypatch.setattr(OutputChange, "alone", alone)
    reused: list[str] = []
    assert stage(model, folder, reused=reused).removal_losses(kinds, all_that_may(kinds, geometry, 3)) == whole
    assert reused == []
    monkeypatch.setattr(OutputChange, "alone", None)
    assert stage(model, folder, reused=reused).removal_losses(kinds, all_that_may(kinds, geometry, 3)) == whole
    assert stage(model, folder).removal_losses(kinds, all_that_may(kinds, geometry, 2)) == one_more
    assert reused == ["search:depth"]


def test_no_more_is_measured_than_a_budget_needs(model: Any, geometry: Geometry, tmp_path: Path) -> None:
    """As many rounds as blocks that go; one where the budget is too small for any."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for number, (share, rounds) in enumerate({0.01: 1, 0.2: 1, 0.44: 2}.items()):
        request, folder = Request({"parameters": share}), tmp_path / str(number)
        stage(model, folder).removal_losses(
            [LAYER], lambda order, request=request: choose_blocks([LAYER], geometry, shapes, request, order)
        )
        assert len(read_json(folder / "search" / "depth.json")["rounds"]) == rounds
    stage(model, tmp_path / "none").removal_losses([LAYER], lambda order: BlockCut(geometry))
    assert len(read_json(tmp_path / "none" / "search" / "depth.json")["rounds"]) == 1


def test_what_can_never_go_scores_as_high_as_any(model: Any, geometry: Geometry, tmp_path: Path) -> None:
    """The attention of the first layer was not tried."""
    losses = stage(model, tmp_path).removal_losses([ATTENTION], all_that_may([ATTENTION], geometry, 2))[ATTENTION]
    assert losses[0] == max(losses)


def test_a_file_of_another_make_is_refused(model: Any, geometry: Geometry, tmp_path: Path) -> None:
    """With what to do about it."""
    asked = stage(model, tmp_path)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "depth.json").write_text('{"key": "key", "rounds": [{"gone": "all"}]}')
    with pytest.raises(CheckpointError, match=r"depth\.json is not what secateur wrote: .* Delete it"):
        asked.removal_losses([LAYER], all_that_may([LAYER], geometry, 1))
