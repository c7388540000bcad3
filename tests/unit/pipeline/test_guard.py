"""The mixture is moved towards the text that is hurt most, and what is kept is never worse than what it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from secateur.errors import CheckpointError, ConfigError
from secateur.pipeline.guard import Guarded, in_parts, least_worst, require_guardable
from secateur.progress import silent
from secateur.records.evaluation import PairedDifference
from secateur.records.plan import LayerPlan, Plan

Weights = Mapping[str, float]
START = in_parts({"law": 1.0, "code": 1.0, "news": 1.0})


def _plan(weights: Weights, steps: int = 4096) -> Plan:
    """Return a plan that is another one for every mixture, or only for every ``steps``-th of the first weight."""
    kept = round(next(iter(weights.values())) * steps)
    layers = {"ffn_channel": (LayerPlan(9000, tuple(range(1 + kept))),)}
    return Plan("llama", "", "uniform", "obs", {}, {}, layers, {"ffn": 1}, {"ffn": 1}, mix=weights)


def _find(
    folder: Path,
    rise: Callable[[str, float], float],
    *,
    start: Weights = START,
    steps: int = 6,
    plan: Callable[[Weights], Plan] = _plan,
    measured: list[Plan] | None = None,
    refitted: bool = False,
) -> Guarded:
    def measure(made: Plan) -> dict[str, PairedDifference]:
        if measured is not None:
            measured.append(made)
        return {name: PairedDifference(rise(name, share), 0.01) for name, share in made.mix.items()}

    file = folder / "guard.json"
    return least_worst(
        start, steps=steps, plan=plan, measure=measure, refitted=refitted, file=file, key="key", progress=silent
    )


@pytest.mark.parametrize(
    "hard",
    [
        {"law": 1.0, "code": 1.0, "news": 1.0},
        {"law": 3.0, "code": 1.0, "news": 1.0},
        {"law": 9.0, "code": 2.0, "news": 1.0},
    ],
)
@pytest.mark.parametrize("power", [0.2, 1.0, -0.3])
def test_the_worst_text_is_never_worse_than_at_the_start(tmp_path: Path, hard: Weights, power: float) -> None:
    """Even where weight on a text does it harm, which no step can mend."""

    def rise(name: str, share: float) -> float:
        return hard[name] / share**power

    found = _find(tmp_path, rise)
    worst = max(rise(name, share) for name, share in found.weights.items())
    began = max(rise(name, share) for name, share in START.items())
    assert worst <= began
    if power > 0 and max(hard.values()) > min(hard.values()):
        assert worst < 0.9 * began


def test_the_best_mixture_is_come_near_to(tmp_path: Path) -> None:
    """Where weight on a text helps it and no other, the worst is least with all of them alike."""
    hard = {"law": 4.0, "code": 1.0}
    found = _find(tmp_path, lambda name, share: hard[name] / share, start=in_parts({"law": 1.0, "code": 1.0}), steps=20)
    assert found.weights["law"] == pytest.approx(0.8, abs=0.05)
    assert (
        "law 0." in found.note and "it began with law 0.5, code 0.5, where that was law +800.00% ± 1.00%" in found.note
    )


def test_falling_losses_are_weighed_too(tmp_path: Path) -> None:
    """Cutting may lower a loss; the text whose loss falls least is then the worst."""
    found = _find(tmp_path, lambda name, share: -share * (2.0 if name == "law" else 1.0))
    assert found.weights["law"] < START["law"]


def test_texts_that_are_hurt_alike_need_one_measurement(tmp_path: Path) -> None:
    """No weight would move."""
    measured: list[Plan] = []
    found = _find(tmp_path, lambda *_: 0.1, measured=measured)
    assert len(measured) == 1
    assert found.weights == START
    assert "1 mixtures tried (1 model)" in found.note and "that the search began with" in found.note


def test_no_more_mixtures_are_tried_than_asked(tmp_path: Path) -> None:
    """The start and as many steps; fewer where the steps have become too small."""
    measured: list[Plan] = []
    _find(tmp_path, lambda name, share: 1 / share if name == "law" else 0.1, steps=3, measured=measured)
    assert len(measured) == 4
    stuck: list[Plan] = []
    _find(tmp_path / "stuck", lambda name, share: 1.0 if name == "law" else 0.1, steps=50, measured=stuck)
    assert len(stuck) == 5


def test_a_model_is_measured_once_however_many_mixtures_come_to_it(tmp_path: Path) -> None:
    """Unless its weights are refitted to the mixture, so that the same units are another model."""

    def coarse(weights: Weights) -> Plan:
        return _plan(weights, steps=1)

    def rise(name: str, share: float) -> float:
        return 1.0 if name == "law" else 0.1

    measured: list[Plan] = []
    found = _find(tmp_path, rise, plan=coarse, measured=measured)
    assert len(measured) == 2 and "5 mixtures tried (2 models)" in found.note
    refitted: list[Plan] = []
    _find(tmp_path / "refitted", rise, plan=coarse, measured=refitted, refitted=True)
    assert len(refitted) == 5


def test_mixtures_are_not_measured_again(tmp_path: Path) -> None:
    """A run that was stopped goes on with those on disk, and comes to the same."""

    def rise(name: str, share: float) -> float:
        return {"law": 3.0, "code": 1.0, "news": 2.0}[name] / share

    whole = _find(tmp_path / "whole", rise)
    _find(tmp_path, rise, steps=2)
    measured: list[Plan] = []
    assert _find(tmp_path, rise, measured=measured) == whole
    kept = json.loads((tmp_path / "guard.json").read_text())["mixtures"]
    assert len(measured) == len(kept) - 3
    assert _find(tmp_path, lambda *_: pytest.fail("measured again")) == whole


def test_what_is_on_disk_is_not_trusted_blindly(tmp_path: Path) -> None:
    """A file of something else is named."""
    (tmp_path / "guard.json").write_text('{"key": "key", "mixtures": [{"weights": 3}]}')
    with pytest.raises(CheckpointError, match=r"guard\.json is not what secateur wrote"):
        _find(tmp_path, lambda *_: 0.1)


def test_weights_add_up_to_one_exactly() -> None:
    """However uneven they are; none is lost."""
    for weights in ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1e-9, "b": 3.0}, {f"t{n}": float(n + 1) for n in range(40)}):
        found = in_parts(weights)
        assert sum(found.values()) == 1.0
        assert min(found.values()) > 0.0
        assert in_parts(found) == found


@pytest.mark.parametrize("needs", ["nothing", "weights"])
def test_a_method_that_reads_no_text_cannot_be_guarded(needs: str) -> None:
    """Weights of texts would change nothing."""
    with pytest.raises(ConfigError, match=rf"method plain reads none \({needs}\)"):
        require_guardable("plain", needs)
    require_guardable("other", "statistics and weights")
