"""The shipped examples: each is a recipe that this version accepts, and shows what it says it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.recipe import Recipe, load_recipe, parse_recipe, with_overrides
from secateur.score import METHODS
from secateur.sweep_recipe import load_sweep, points_of

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yml"))


def test_there_are_examples() -> None:
    """One for each purpose, and no file that is not checked here."""
    names = [file.name for file in EXAMPLES]
    assert {"laptop.yml", "medical.yml", "paper_thresholds.yml", "pico.yml", "vocabulary.yml"} <= set(names)
    others = sorted(file.name for file in FOLDER.iterdir() if file.name not in names)
    assert others == ["taiwan_legal", "tasks"], (
        "a script that needs the network; and tasks, tried in tests of their own"
    )


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_recipe(file: Path) -> None:
    """It parses, its method takes its options, its output is its own, and it starts by saying what it is for."""
    sweeps = "\nsweep:" in file.read_text(encoding="utf-8")
    recipe = load_sweep(file)[0] if sweeps else load_recipe(file)
    METHODS[recipe.prune.method].check_options(recipe.prune.options)
    assert recipe.output == f"runs/{file.stem}"
    assert file.read_text(encoding="utf-8").startswith("# ")
    assert f"examples/{file.name}" in file.read_text(encoding="utf-8")
    assert parse_recipe(recipe.model_dump()) == recipe


def test_the_paper_example_is_the_papers_rule() -> None:
    """An absolute threshold on the output of the dense layer, each layer its own width."""
    prune = load_recipe(FOLDER / "paper_thresholds.yml").prune
    assert prune.budget.threshold == 1e-3
    assert (prune.method, prune.options, prune.shape) == ("contextual", {"at": "linear"}, "uneven")


def test_the_points_of_the_sweep_are_recipes() -> None:
    """Each of them parses, and they have names of their own."""
    recipe, spec = load_sweep(FOLDER / "sweep.yml")
    points = points_of(spec)
    assert len({point.name for point in points}) == len(points) == 17
    for point in points:
        method = with_overrides(recipe, point.overrides).prune.method
        assert method in METHODS


def test_the_laptop_example_is_small() -> None:
    """Less text than by default."""
    recipe = load_recipe(FOLDER / "laptop.yml")
    defaults = Recipe(model="m", domain={"d": "t.txt"})  # type: ignore[dict-item]
    assert recipe.calibrate.max_tokens is not None and defaults.calibrate.max_tokens is not None
    assert recipe.calibrate.max_tokens < defaults.calibrate.max_tokens / 8
    assert recipe.calibrate.block_size < defaults.calibrate.block_size
