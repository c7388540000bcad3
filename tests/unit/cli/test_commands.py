"""Commands that answer without a run: ``inspect`` and ``methods``; and what the options of a recipe command mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.cli.recipe_options import RecipeOptions
from secateur.errors import ConfigError
from secateur.files import CACHE_VARIABLE
from tests.command import call
from tests.pico import save_model_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def options(**changes: object) -> RecipeOptions:
    """Return the options of a command called with a recipe and nothing else, with changes."""
    plain = {"recipe": "r.yml", "output": None, "method": None, "budget": (), "settings": ()}
    return RecipeOptions(**{**plain, "as_json": False, "quiet": False, **changes})  # type: ignore[arg-type]


def test_options_become_dotted_recipe_keys() -> None:
    """Values are read as YAML; what was not said is not set."""
    assert options().overrides() == {}
    budget, settings = ("channels=0.2", "groups=0.5"), ("prune.seed=3", "general=")
    said = options(output="runs/a", method="magnitude", budget=budget, settings=settings)
    assert said.overrides() == {
        "prune.seed": 3,
        "general": None,
        "output": "runs/a",
        "prune.method": "magnitude",
        "prune.budget": {"channels": 0.2, "groups": 0.5},
    }


def test_the_special_options_win_over_set() -> None:
    """--output and --set output=... may not both be meant; the one with its own name wins."""
    assert options(output="b", settings=("output=a",)).overrides() == {"output": "b"}


@pytest.mark.parametrize("changes", [{"settings": ("prune.seed",)}, {"budget": ("channels",)}, {"settings": ("a=[",)}])
def test_options_that_cannot_be_read_are_refused(changes: dict[str, tuple[str]]) -> None:
    """A missing equals sign, or a value that is not YAML."""
    with pytest.raises(ConfigError, match="cannot read"):
        options(**changes).overrides()


def test_inspect_shows_where_the_parameters_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By part, with shares and bytes; by layer when asked; and which units there are."""
    folder = save_model_folder(tmp_path / "pico")
    answer = call(capsys, "inspect", folder, "--layers")
    assert answer.code == 0, answer.err
    assert "where the parameters are" in answer.out
    assert "100.0%" in answer.out
    assert "family llama, 2 layers, each with 96 ffn_channels, 4 gqa_groups" in answer.out
    assert "layers" not in call(capsys, "inspect", folder).out.partition("family")[0]


def test_inspect_answers_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object; its parts add up to the model; weights are never loaded."""
    folder = save_model_folder(tmp_path / "pico")
    found = call(capsys, "inspect", folder, "--json").json()
    assert (found["family"], found["dtype"]) == ("llama", "float32")
    assert 4 * sum(found["parameters"].values()) <= found["size_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["units"] == {"ffn_channel": [96, 96], "gqa_group": [4, 4]}
    assert found["fixed"] == {}


def test_inspect_says_what_cannot_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A family with fixed heads says why."""
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2}
    folder = save_model_folder(tmp_path / "opt", model_type="opt", num_attention_heads=6, **sizes)
    assert "gqa_groups cannot be cut: OPT derives" in call(capsys, "inspect", folder).out


def test_methods_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, what it measures, what it needs and where it comes from."""
    answer = call(capsys, "methods")
    assert answer.code == 0
    for words in ("contextual", "magnitude", "statistics", "2312.12682"):
        assert words in answer.out
