"""Sweep files: which points a grid gives, what they are called, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.errors import ConfigError
from secateur.recipe import load_recipe
from secateur.sweep_recipe import Point, SweepSpec, chosen, load_sweep, parse_sweep, points_of

BASE = {"model": "m", "domain": {"d": "d.txt"}}


def points(grid: dict[str, Any] | None = None, singles: list[dict[str, Any]] | None = None) -> list[Point]:
    """Return the points of a grid and of single ones."""
    return points_of(SweepSpec(grid=grid or {}, points=singles or []))


def test_a_grid_gives_every_combination_and_points_come_after() -> None:
    """The last key varies first, and names say what is changed."""
    found = points(
        {"prune.method": ["wanda", "kfac"], "prune.budget": [{"channels": 0.1}, {"channels": 0.2}]},
        [{"prune.method": "obs", "recover": {"max_tokens": 8192}}, {"name": "mine", "recover": None}],
    )
    assert [point.name for point in found] == [
        "wanda-channels_0.1",
        "wanda-channels_0.2",
        "kfac-channels_0.1",
        "kfac-channels_0.2",
        "obs-recover+max_tokens_8192",
        "mine",
    ]
    assert found[1].overrides == {"prune.method": "wanda", "prune.budget": {"channels": 0.2}}
    assert found[5].overrides == {"recover": None}


def test_a_preset_stands_for_its_budgets_beside_others() -> None:
    """The thresholds of the paper's range are written with one word."""
    found = points({"prune.budget": ["thresholds", {"channels": 0.5}]})
    assert [point.overrides["prune.budget"] for point in found[:4]] == [
        {"threshold": 1e-4},
        {"threshold": 1e-3},
        {"threshold": 1e-2},
        {"threshold": 1e-1},
    ]
    assert points({"prune.budget": "thresholds"})[0].name == "threshold_0.0001"
    assert found[4].name == "channels_0.5"


def test_names_are_safe_different_and_do_not_depend_on_other_points() -> None:
    """Slashes and spaces go, long ones are cut, and equal ones are told apart by what they change."""
    [odd] = points(singles=[{"prune.options": {"at": "a/b c"}}])
    assert odd.name == "options+at_a_b_c"
    [long] = points(singles=[{"prune.vocabulary": {"keep": ["x" * 200]}}])
    assert len(long.name) <= 90
    first, second = points(singles=[{"calibrate.batch_size": 1}, {"evaluate.batch_size": 1}])
    assert first.name != second.name
    assert first.name.startswith("batch_size_1-")
    assert points({"prune.seed": [1, 2]})[0] == points({"prune.seed": [1, 2, 3]})[0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "has no section sweep"),
        ([], "must be a mapping"),
        ({}, "give a grid, such as"),
        ({"grids": {}}, "unknown key at sweep: 'grids'.*grid"),
        ({"grid": {"prune.seed": []}}, r"sweep\.grid\.prune\.seed: list should have at least 1 item"),
        ({"grid": {"prune.seed": 1}}, r"sweep\.grid\.prune\.seed: input should be a valid list"),
        ({"grid": {"prune.seed": [1]}, "keep_models": "best"}, "keep_models"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(section: Any, message: str) -> None:
    """The place in the file is named."""
    data = BASE if section is None else {**BASE, "sweep": section}
    with pytest.raises(ConfigError, match=message):
        parse_sweep(data)


def test_unknown_presets_repeated_points_and_huge_grids_are_refused() -> None:
    """Each is a slip that would cost hours."""
    with pytest.raises(ConfigError, match=r"unknown preset 'threshold'.*thresholds"):
        points({"prune.budget": "threshold"})
    with pytest.raises(ConfigError, match="is there twice"):
        points({"prune.seed": [1]}, [{"prune.seed": 1}])
    with pytest.raises(ConfigError, match="10,000 points; at most 1,000"):
        points({"prune.seed": list(range(100)), "recover.seed": list(range(100))})


def test_points_are_chosen_by_pattern() -> None:
    """A pattern that matches nothing is a slip, and the nearest name is said."""
    found = points({"prune.method": ["wanda", "kfac"]})
    assert [point.name for point in chosen(found, ["wa*"])] == ["wanda"]
    assert chosen(found, []) == found
    with pytest.raises(ConfigError, match=r"unknown point 'wand'.*wanda"):
        chosen(found, ["wand"])


def test_a_sweep_file_is_a_recipe_and_more(tmp_path: Path) -> None:
    """Overrides change what is common; as a recipe the file is refused with the right command."""
    file = tmp_path / "sweep.yml"
    file.write_text("model: m\ndomain: {d: d.txt}\nsweep: {grid: {prune.seed: [1, 2]}}\n", encoding="utf-8")
    recipe, spec = load_sweep(file, {"output": "elsewhere"})
    assert (recipe.output, spec.grid) == ("elsewhere", {"prune.seed": [1, 2]})
    with pytest.raises(ConfigError, match="secateur sweep"):
        load_recipe(file)
