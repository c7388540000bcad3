"""Commands that answer without a run: ``inspect``, ``vocabulary`` and ``methods``; and what options of others mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from secateur.cli.recipe_options import RecipeOptions
from secateur.errors import ConfigError
from secateur.files import CACHE_VARIABLE
from secateur.recipe import parse_recipe
from tests.command import call
from tests.pico import Pico, build_pico, save_model_folder

TEMPLATE = ("--text", "Question: {question}\nAnswer: {answer}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def options(**changes: object) -> RecipeOptions:
    """Return the options of a command called with a recipe and nothing else, with changes."""
    plain = {"recipe": "r.yml", "output": None, "method": None, "budget": (), "mix": (), "settings": ()}
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


def test_a_mixture_takes_the_place_of_the_recipes_buckets() -> None:
    """--mix is given once per bucket; the two ways to say whose text decides never meet."""
    said = options(mix=("medical=0.8", "general=0.2"))
    assert said.overrides() == {"prune.mix": {"medical": 0.8, "general": 0.2}, "prune.buckets": None}


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
    assert found["units"] == {"ffn_channel": [96, 96], "gqa_group": [4, 4], "query_head": [8, 8]}
    assert found["fixed"] == {}


def test_inspect_says_what_cannot_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A family with fixed heads says why."""
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2}
    folder = save_model_folder(tmp_path / "opt", model_type="opt", num_attention_heads=6, **sizes)
    assert "gqa_groups cannot be cut: OPT derives" in call(capsys, "inspect", folder).out


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A model folder, a domain corpus and a general text; nobody changes them."""
    return build_pico(tmp_path_factory.mktemp("pico"))


def test_vocabulary_shows_what_rules_would_cost(pico: Pico, capsys: pytest.CaptureFixture[str]) -> None:
    """The text, the curve and the rules, those that cannot be met too; and a rule to put into a recipe."""
    rules = ("--min-count", 20, "--min-count", 2, "--coverage", 0.9, "--size", 5, "--threshold", "paper")
    answer = call(capsys, "vocabulary", pico.model, pico.domain, *TEMPLATE, *rules, "--keep", "aspirin", "--quiet")
    assert (answer.code, answer.err) == (0, "")
    titles = ("token frequency", "keep rules", "tokens that go", "byte-level BPE", "must stay", "`secateur run`")
    shown = ("min_count 20", "min_count 2 ", "coverage 0.9", "size 5", "threshold 0.0", "cannot be met", "too small")
    for words in (*titles, *shown):
        assert words in answer.out
    assert "other" not in answer.out
    recipe = {"model": "m", "domain": {"a": "a.txt"}, **yaml.safe_load(answer.out.rpartition("example\n\n")[2])}
    found = parse_recipe(recipe).prune.vocabulary
    assert found is not None and (found.rule(), found.keep) == ({"min_count": 20}, ["aspirin"])


def test_vocabulary_answers_machines(pico: Pico, capsys: pytest.CaptureFixture[str]) -> None:
    """One object, with the default rules and another corpus; progress stays on stderr."""
    answer = call(capsys, "vocabulary", pico.model, pico.domain, *TEMPLATE, "--compare", pico.general, "--json")
    found = answer.json()
    assert found["counted"]["name"] == found["heldout"]["name"] == str(pico.domain)
    assert found["other_counted"]["name"] == str(pico.general)
    assert found["frequencies"][-1]["coverage"] == 1.0
    assert [rule["rule"] for rule in found["rules"][:2]] == [{"min_count": 1}, {"min_count": 2}]
    assert all(rule["other"]["inflation"] > rule["heldout"]["inflation"] for rule in found["rules"])
    assert "held-out text" in answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compare-text", "{question}"), "--compare-text needs --compare"),
        (("--coverage", 2), "prune.vocabulary.coverage"),
        (("--threshold", "some"), "prune.vocabulary.threshold"),
        (("--min-count", 0), "--min-count"),
        (("--keep-characters", "Greek"), "cannot read 'Greek' as a range of characters"),
        (("--keep-file", "nowhere.txt"), "keep_file nowhere.txt cannot be read"),
        (("--compare", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_vocabulary_refuses_what_cannot_be(
    pico: Pico, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], words: str
) -> None:
    """Exit code 2, and what to mend."""
    answer = call(capsys, "vocabulary", pico.model, pico.domain, *TEMPLATE, *arguments, "--quiet")
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


def test_vocabulary_refuses_other_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str], pico: Pico) -> None:
    """A tokenizer that cannot be cut is named before any text is read."""
    folder = save_model_folder(tmp_path / "words")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    answer = call(capsys, "vocabulary", folder, pico.domain, *TEMPLATE, "--quiet")
    assert answer.code == 2
    assert "WordLevel cannot be cut" in answer.err


def test_methods_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, what it measures, what it needs and where it comes from."""
    answer = call(capsys, "methods")
    assert answer.code == 0
    for words in ("contextual", "magnitude", "statistics", "2312.12682"):
        assert words in answer.out
