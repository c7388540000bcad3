"""What the points of a sweep show together: the front, against brute force; comparability; files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from secateur.errors import CheckpointError, ConfigError, ExportError
from secateur.pipeline.sweep import Measured, read_sweep, standings, summarise
from secateur.pipeline.trials import Trial, TrialResult, prepare
from secateur.recipe import parse_recipe
from secateur.records.evaluation import Evaluation, ModelScore, TextScore
from secateur.records.plan import LayerPlan, Plan
from secateur.records.sweep import Sweep, columns_of

DOCUMENTS = 60
TOKENS = tuple(20 + 3 * (i % 5) for i in range(DOCUMENTS))


def text(losses: np.ndarray, fingerprint: str = "f" * 20) -> TextScore:
    """Return a score of documents with these losses per token."""
    summed = tuple(float(loss * count) for loss, count in zip(losses, TOKENS, strict=True))
    mean = sum(summed) / sum(TOKENS)
    sizes = tuple(4 * count for count in TOKENS)
    return TextScore(
        mean, 0.1, mean / 4, 0.1, sum(TOKENS), sum(sizes), DOCUMENTS, 0, fingerprint, 1.0, summed, TOKENS, sizes
    )


def row(name: str, size: int, losses: dict[str, np.ndarray], fingerprint: str = "f" * 20) -> ModelScore:
    """Return a row of an evaluation."""
    return ModelScore(name, {"ffn": size}, 2 * size, {b: text(found, fingerprint) for b, found in losses.items()})


DENSE = {name: np.full(DOCUMENTS, 2.0) for name in ("a", "b")}


def measured(size: int, above: float, noise: float, seed: int, **rows: float) -> Evaluation:
    """Return an evaluation whose pruned model loses ``above`` nats per token more, give or take the noise."""
    draw = np.random.default_rng(seed)
    models = {"dense": row("dense", 100, DENSE)}
    for name, extra in {"pruned": above, **rows}.items():
        losses = {bucket: loss + extra + noise * draw.standard_normal(DOCUMENTS) for bucket, loss in DENSE.items()}
        models[name] = row(name, size, losses)
    return Evaluation(models, seed=0)


def plan() -> Plan:
    """Return a plan that narrows a layer."""
    return Plan(
        family="llama",
        model_fingerprint="m",
        shape="uniform",
        method="wanda",
        options={},
        budget={},
        layers={"ffn_channel": (LayerPlan(4, (0, 1)),)},
        parameters_dense={"ffn": 100},
        parameters_pruned={"ffn": 50},
        calibrated_on=("a",),
        calibration_tokens=1,
    )


def result(name: str, evaluation: Evaluation | None, folder: Path, **overrides: Any) -> TrialResult:
    """Return what came of a trial: done where it was measured, else failed."""
    status, message = ("done", "") if evaluation else ("failed", "too bad")
    made = plan() if evaluation else None
    trial = Trial(name, overrides)
    return TrialResult(trial, folder / "trials" / name, status, message, 1.5, False, made, evaluation, "")


def swept(results: list[TrialResult], folder: Path) -> Sweep:
    """Return what results show."""
    return summarise(results, model="m", domains=["a"], folder=folder, varied=["k"], recipe_yaml="model: m\n", seed=0)


def test_the_front_is_that_of_brute_force_and_behind_means_by_more_than_chance() -> None:
    """Off the front is where another point is no larger and no worse; behind only where paired losses differ surely."""
    draw = np.random.default_rng(1)
    domains = ["a", "b"]
    sizes, losses = draw.integers(40, 60, 25), draw.uniform(0, 0.3, 25)
    found = {str(i): Measured.of(measured(int(sizes[i]), float(losses[i]), 0.4, i), domains) for i in range(len(sizes))}
    means = {}
    for name, point in found.items():
        per_domain = []
        for domain in domains:
            nll = np.array(point.score.text[domain].document_nll) - np.array(point.dense.text[domain].document_nll)
            per_domain.append(nll.sum() / sum(TOKENS))
        means[name] = float(np.mean(per_domain))
    told = standings(found)
    for name, point in found.items():
        rivals = [
            other
            for other in found
            if other != name
            and found[other].score.total_parameters <= point.score.total_parameters
            and means[other] <= means[name]
        ]
        assert (told[name][0] == "front") == (not rivals)
        surely = False
        for other in rivals:
            deltas = {
                d: np.array(point.score.text[d].document_nll) - np.array(found[other].score.text[d].document_nll)
                for d in domains
            }
            rates = {d: delta.sum() / sum(TOKENS) for d, delta in deltas.items()}
            spread = [
                ((deltas[d] - rates[d] * np.array(TOKENS)) ** 2).sum() * DOCUMENTS / (DOCUMENTS - 1) / sum(TOKENS) ** 2
                for d in domains
            ]
            on_front = told[other][0] == "front"
            surely |= on_front and np.mean(list(rates.values())) > 1.645 * math.sqrt(sum(spread)) / 2
        if rivals:
            assert (told[name][0] == "behind") == surely
            assert bool(told[name][1]) == surely
    assert {entry[0] for entry in told.values()} == {"front", "level", "behind"}


def test_equal_points_are_both_on_the_front() -> None:
    """None of two equal models is better."""
    one = Measured.of(measured(50, 0.1, 0.1, 3), ["a"])
    assert [found[0] for found in standings({"x": one, "y": one}).values()] == ["front", "front"]


def test_a_recovered_model_counts_and_is_held_against_a_random_cut_trained_alike(tmp_path: Path) -> None:
    """The row after training is the point's; its control is the random cut after the same training."""
    evaluation = measured(50, 0.5, 0.01, 0, recovered=0.1, random=0.9, random_recovered=0.05)
    [point] = swept([result("r", evaluation, tmp_path)], tmp_path).points
    assert (point.row, point.parameters, point.pruning_ratio) == ("recovered", 50, 0.5)
    assert point.text["a"].ratio == pytest.approx(math.exp(0.1), rel=0.02)
    assert point.random_ratio == pytest.approx(math.exp(0.05), rel=0.02)
    assert point.beats_random is False
    better = measured(50, 0.1, 0.01, 0, random=0.9)
    assert swept([result("r", better, tmp_path)], tmp_path).points[0].beats_random is True


def test_points_measured_on_other_text_are_marked_and_not_compared(tmp_path: Path) -> None:
    """The text of most points is the common one; a better loss on other text puts nobody on the front."""
    plain = measured(50, 0.1, 0.01, 0)
    other = measured(40, 0.0, 0.01, 1)
    moved = {
        name: replace(model, text={b: replace(s, corpus_fingerprint="0" * 20) for b, s in model.text.items()})
        for name, model in other.models.items()
    }
    results = [
        result("one", plain, tmp_path, k=1),
        result("odd", replace(other, models=moved), tmp_path, k=2),
        result("two", measured(60, 0.2, 0.01, 2), tmp_path, k=3),
        result("bad", None, tmp_path, k=4),
    ]
    sweep = swept(results, tmp_path)
    assert [point.is_comparable for point in sweep.points] == [True, False, True, True]
    assert [point.standing for point in sweep.points] == ["front", "", "behind", ""]
    assert sweep.points[2].beaten_by == "one"
    assert (sweep.points[3].status, sweep.points[3].message) == ("failed", "too bad")
    assert Sweep.from_dict(sweep.to_dict()) == sweep


def test_columns_have_one_kind_each_and_go_into_a_data_frame(tmp_path: Path) -> None:
    """Numbers stay numbers, what is mixed becomes JSON, and a key that a point does not set is missing."""
    evaluation = measured(50, 0.1, 0.01, 0)
    names = ["x", "y", "z"]
    results = [result("x", evaluation, tmp_path, k=1), result("y", None, tmp_path, k=0.5), result("z", None, tmp_path)]
    columns = columns_of(swept(results, tmp_path))
    assert columns["k"] == [1.0, 0.5, None]
    assert columns["a.ratio"][1:] == [None, None]
    mixed = [result(name, None, tmp_path, k=value) for name, value in zip(names, ({"c": 1}, None, "w"), strict=True)]
    assert columns_of(swept(mixed, tmp_path))["k"] == ['{"c": 1}', "null", '"w"']
    file = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert pyarrow.parquet.read_table(file).column("name").to_pylist() == names


def test_a_sweep_file_of_another_version_is_refused(tmp_path: Path) -> None:
    """The message says how to have it again."""
    (tmp_path / "sweep.json").write_text('{"schema_version": 99}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="points that are done are not run again"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([], "there is nothing to run"),
        ([Trial("a/b", {})], "cannot be the name of a folder"),
        ([Trial("a", {}), Trial("A", {})], "two points are called a"),
        ([Trial("a", {"output": "x"})], "a: output is where all points go"),
        ([Trial("bad", {"prune.budget": {"channel": 0.1}})], r"point bad cannot be run: .*channels"),
    ],
)
def test_trials_that_can_never_work_are_refused_by_name(tmp_path: Path, trials: list[Trial], message: str) -> None:
    """Before anything is read or written."""
    recipe = parse_recipe({"model": "m", "domain": {"d": "d.txt"}, "output": str(tmp_path / "out")})
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        prepare(recipe, trials, keep_models=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_written_into(tmp_path: Path) -> None:
    """Neither a run's folder nor any other."""
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    recipe = parse_recipe({"model": "m", "domain": {"d": "d.txt"}, "output": str(tmp_path)})
    with pytest.raises(ExportError, match=r"holds no trials \(it holds manifest.json\)"):
        prepare(recipe, [Trial("a", {})], keep_models=False)
