"""The recipe: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from secateur.errors import ConfigError
from secateur.recipe import (
    THRESHOLD_PRESETS,
    Budget,
    ChoicesSpec,
    CorpusSpec,
    ExportSpec,
    GenerationsSpec,
    PruneSpec,
    Recipe,
    SpeedSpec,
    TasksSpec,
    VocabularySpec,
    load_recipe,
    parse_bytes,
    parse_character_range,
    parse_override,
    parse_prune,
    parse_recipe,
    parse_speed,
)

MINIMAL = {"model": "m", "domain": {"medical": "a.txt"}}


def recipe(**changes: Any) -> Recipe:
    """Return the minimal recipe with some top-level keys changed."""
    return parse_recipe({**MINIMAL, **changes})


def prune(**changes: Any) -> PruneSpec:
    """Return the prune section of the minimal recipe with some keys changed."""
    return recipe(prune=changes).prune


def refusal(**changes: Any) -> str:
    """Return the message with which a changed minimal recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        recipe(**changes)
    return str(caught.value)


def test_a_minimal_recipe_is_complete() -> None:
    """A model and a corpus are enough; the defaults are the documented ones."""
    done = recipe()
    assert done.domain == {"medical": CorpusSpec(path="a.txt")}
    assert done.prune.method == "contextual"
    assert done.prune.budget.channels == 0.1
    assert (done.prune.shape, done.prune.allocation, done.prune.min_keep_ratio) == ("uniform", "auto", 0.1)
    assert done.evaluate.controls == ["random"]
    assert done.export == []
    assert done.trust_remote_code is False


def test_a_recipe_is_frozen() -> None:
    """What was asked for cannot change under way."""
    with pytest.raises(ValidationError, match="frozen"):
        recipe().output = "elsewhere"  # type: ignore[misc]


def test_an_export_in_short_form_is_a_target() -> None:
    """The rest has the documented defaults, and survives YAML."""
    done = recipe(export=["gguf", {"to": "gguf", "quantize": "Q8_0", "round_to_fit": True}])
    assert done.export == [ExportSpec(to="gguf"), ExportSpec(to="gguf", quantize="Q8_0", round_to_fit=True)]
    assert parse_recipe(yaml.safe_load(done.to_yaml())) == done


def test_questions_in_short_form_are_a_path() -> None:
    """The rest has the documented defaults, and survives YAML."""
    done = recipe(evaluate={"choices": {"exam": "a.jsonl", "mmlu": {"path": ["b.csv"], "choices": ["x", "y"]}}})
    assert done.evaluate.choices["exam"] == ChoicesSpec(path="a.jsonl")
    spec = ChoicesSpec(path="a")
    assert (spec.question, spec.choices, spec.answer, spec.prompt) == ("{question}", "choices", "answer", None)
    assert (spec.style, spec.max_items, spec.seed) == ("text", 1000, 0)
    assert parse_recipe(yaml.safe_load(done.to_yaml())) == done
    assert recipe().evaluate.choices == {}


def test_speed_is_measured_only_where_it_is_asked_for() -> None:
    """``{}`` and ``true`` take the documented defaults, a single number is a list of one, and YAML keeps all of it."""
    assert recipe().evaluate.speed is None
    assert recipe(evaluate={"speed": False}).evaluate.speed is None
    done = recipe(evaluate={"speed": {}})
    assert done.evaluate.speed == recipe(evaluate={"speed": True}).evaluate.speed == SpeedSpec()
    defaults = {"prompt_lengths": [128, 512], "new_tokens": 32, "batch_sizes": [1, 4], "rounds": 5}
    assert SpeedSpec().model_dump() == defaults
    assert parse_recipe(yaml.safe_load(done.to_yaml())) == done
    assert parse_speed({"prompt_lengths": 64}).prompt_lengths == [64]


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        ({"prompt_lengths": []}, "evaluate.speed.prompt_lengths: list should have at least 1 item"),
        ({"prompt_lengths": [0]}, "speed.prompt_lengths.0: input should be greater than or equal to 1 (got 0)"),
        ({"batch_sizes": [4, 1, 4]}, "evaluate.speed.batch_sizes: 4 is given twice"),
        ({"new_tokens": 1}, "evaluate.speed.new_tokens: input should be greater than or equal to 2 (got 1)"),
        ({"rounds": 0}, "evaluate.speed.rounds: input should be greater than or equal to 1 (got 0)"),
        ({"prompt_length": 3}, "Did you mean 'prompt_lengths'?"),
    ],
)
def test_impossible_speed_settings_are_refused(speed: dict[str, Any], message: str) -> None:
    """The place is named, with what was given."""
    assert message in refusal(evaluate={"speed": speed})


def test_generations_and_tasks_have_short_forms() -> None:
    """``true`` takes the defaults, a name or a list of names are the names."""
    asked = recipe(evaluate={"generations": True, "tasks": "hellaswag"}).evaluate
    assert (asked.generations, asked.tasks) == (GenerationsSpec(), TasksSpec(names=["hellaswag"]))
    asked = recipe(evaluate={"generations": False, "tasks": ["a", "b"]}).evaluate
    assert (asked.generations, asked.tasks) == (None, TasksSpec(names=["a", "b"]))
    assert "prompt_tokens" not in recipe().to_yaml()


def test_short_forms_are_paths() -> None:
    """A corpus that is only a string or a list means its path, for domains and for the general bucket."""
    done = recipe(domain={"a": "a.txt", "b": ["b.txt", "c.txt"]}, general="g.txt")
    assert done.domain["a"].path == "a.txt"
    assert done.domain["b"].path == ["b.txt", "c.txt"]
    assert done.general == CorpusSpec(path="g.txt")


def test_buckets_are_the_domains_then_the_general_one() -> None:
    """The order is the recipe's, the general bucket last and only if there is one."""
    assert list(recipe(domain={"z": "z.txt", "a": "a.txt"}, general="g.txt").buckets()) == ["z", "a", "general"]
    assert list(recipe().buckets()) == ["medical"]


@pytest.mark.parametrize("data", [None, [], "model: m", 3])
def test_a_recipe_that_is_not_a_mapping_is_refused(data: object) -> None:
    """The message says what a recipe is and what was received."""
    with pytest.raises(ConfigError, match=rf"here must be a mapping of keys .* got {type(data).__name__}"):
        parse_recipe(data, source="here")


def test_missing_keys_are_all_named_at_once() -> None:
    """One look at the message is enough to complete the recipe."""
    with pytest.raises(ConfigError) as caught:
        parse_recipe({}, source="recipe r.yml")
    assert str(caught.value) == "recipe r.yml cannot be used:\n  model: field required\n  domain: field required"


@pytest.mark.parametrize(
    ("changes", "place", "meant", "not_known"),
    [
        ({"prun": {}}, "prun", "prune", "channels"),
        ({"prune": {"budgett": {}}}, "prune.budgett", "budget", "channels"),
        ({"prune": {"budget": {"chanels": 0.1}}}, "prune.budget.chanels", "channels", "method"),
        ({"calibrate": {"max_token": 1}}, "calibrate.max_token", "max_tokens", "model"),
        ({"evaluate": {"batchsize": 1}}, "evaluate.batchsize", "batch_size", "model"),
        ({"general": {"pth": "a"}}, "general.pth", "path", "model"),
        ({"general": {"path": "a", "splits": {"tset": 1}}}, "general.splits.tset", "test", "path"),
        ({"domain": {"medical": {"pth": "a"}}}, "domain.medical.pth", "path", "model"),
        ({"domain": {"x": {"path": "a", "splits": {"tset": 1}}}}, "domain.x.splits.tset", "test", "path"),
        ({"domain": {"prune": {"pth": "a"}}}, "domain.prune.pth", "path", "method"),
        ({"evaluate": {"choices": {"exam": {"pth": "a"}}}}, "evaluate.choices.exam.pth", "path", "method"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_one(
    changes: dict[str, Any], place: str, meant: str, not_known: str
) -> None:
    """A misspelt key names its place, the key that was meant, and the keys known there and nowhere else."""
    message = refusal(**changes)
    key = place.rpartition(".")[2]
    assert f"unknown key at {place}: {key!r}. Did you mean {meant!r}? Known: " in message
    known = message.partition("Known: ")[2].splitlines()[0].rstrip(".").split(", ")
    assert meant in known
    assert not_known not in known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domain": {}}, "domain: dictionary should have at least 1 item"),
        ({"domain": {"general": "a"}}, "domain: a domain bucket cannot be called 'general'"),
        ({"domain": {"a b": "a"}}, "domain: bucket name 'a b' must be letters, digits"),
        ({"domain": {"../a": "a"}}, "domain: bucket name '../a' must be"),
        ({"domain": {"a": {"path": "a", "dataset": "b"}}}, "domain.a: give exactly one of path, dataset"),
        ({"domain": {"a": {}}}, "domain.a: give exactly one of path, dataset, or explicit"),
        ({"domain": {"a": {"calibration": "x"}}}, "explicit splits need at least calibration and test paths; got cal"),
        ({"domain": {"a": {"path": "a", "calibration": "x", "test": "y"}}}, "domain.a: give exactly one of"),
        (
            {"domain": {"a": {"path": "a", "splits": {"calibration": 0.5, "validation": 0.2, "test": 0.2}}}},
            "domain.a.splits: the three shares add up to 0.9; they must add up to 1",
        ),
        ({"general": {"path": "a", "errors": "skip"}}, "general.errors: input should be 'strict', 'replace' or 'igno"),
        ({"calibrate": {"block_size": 4}}, "calibrate.block_size: input should be greater than or equal to 8 (got 4)"),
        ({"calibrate": {"max_tokens": 0}}, "calibrate.max_tokens: input should be greater than 0 (got 0)"),
        (
            {"evaluate": {"generations": {"prompt": "{q}", "prompt_tokens": 9}}},
            "evaluate.generations: prompt_tokens cuts prompts from documents and prompt makes them; give one of them",
        ),
        (
            {"evaluate": {"generations": {"temperature": 0}}},
            "evaluate.generations.temperature: input should be greater",
        ),
        ({"evaluate": {"tasks": []}}, "evaluate.tasks.names: list should have at least 1 item"),
        ({"evaluate": {"tasks": ["a", "a"]}}, "evaluate.tasks.names: task 'a' is named twice"),
        ({"evaluate": {"tasks": {"names": "a", "limit": 1.5}}}, "evaluate.tasks.limit: limit is a number of documents"),
        ({"prune": {"method": 3}}, "prune.method: input should be a valid string (got 3)"),
        ({"prune": {"budget": {"channels": 0}}}, "prune.budget.channels: input should be greater than 0 (got 0)"),
        ({"prune": {"budget": {"channels": 1}}}, "prune.budget.channels: input should be less than 1 (got 1)"),
        ({"prune": {"budget": {"threshold": -1}}}, "prune.budget.threshold: input should be greater than or equal"),
        ({"prune": {"budget": {"threshold": float("nan")}}}, "prune.budget.threshold: "),
        ({"prune": {"budget": {"threshold": "harsh"}}}, "prune.budget.threshold: input should be a valid number"),
        ({"prune": {"budget": {"bytes": "12 apples"}}}, "prune.budget.bytes: cannot read '12 apples' as a size"),
        ({"prune": {"budget": {"bytes": "1.2.3MB"}}}, "prune.budget.bytes: cannot read '1.2.3MB' as a size"),
        ({"prune": {"budget": {"bytes": 0}}}, "prune.budget.bytes: input should be greater than 0 (got 0)"),
        (
            {"prune": {"budget": {}}},
            "or one or more of channels, groups, heads, experts, expert_channels, shared_chann",
        ),
        ({"prune": {"budget": {"parameters": 0.1, "bytes": 5}}}, "; got bytes, parameters"),
        ({"prune": {"units": []}}, "prune: units is an empty list; name at least one"),
        ({"prune": {"units": ["neuron"]}}, "'attention', 'ffn', 'layer' or 'vocabulary' (got 'neuron')"),
        ({"prune": {"units": ["expert"]}}, "prune: the budget is in ffn_channel but units names expert"),
        (
            {"prune": {"units": ["expert", "expert_channel"], "budget": {"parameters": 0.1}}},
            "prune: expert and expert_channel are parts of each other, so taking out both is two cuts",
        ),
        (
            {"prune": {"budget": {"expert_channels": 0.5}, "reconstruct": "dense"}},
            "prune: reconstruct fits the projections of dense layers, and the scales of experts where whole ones go; "
            "expert_channel is about channels of experts",
        ),
        (
            {"prune": {"units": ["shared_channel"], "budget": {"parameters": 0.1}, "allocation": "search"}},
            "prune: allocation: search measures cuts of dense layers, and units names shared_channel",
        ),
        (
            {"prune": {"units": ["layer"]}},
            "units names layer and there is no budget; give one, for example {layers: 0.2}",
        ),
        (
            {"prune": {"units": ["layer"], "budget": {"attention": 0.5}, "shape": "uneven"}},
            "the budget is in attention but units names layer",
        ),
        (
            {"prune": {"budget": {"attention": 0.5}}},
            "units of kind attention leave layers that differ, and shape: uniform takes only whole layers out",
        ),
        (
            {"prune": {"units": ["layer", "ffn_channel"], "budget": {"threshold": 0.1}}},
            "budget.threshold is for channels, groups and query heads, and units names layer; give a share, for",
        ),
        (
            {"prune": {"budget": {"heads": 0.5, "groups": 0.5}}},
            "gqa_group and query_head are parts of each other, so taking out both is two cuts; choose one, and prune",
        ),
        (
            {
                "prune": {
                    "units": ["query_head", "layer", "attention"],
                    "budget": {"parameters": 0.5},
                    "shape": "uneven",
                    "allocation": "knapsack",
                }
            },
            "allocation: knapsack cannot weigh query_head against attention and layer; choose one of them",
        ),
        (
            {"prune": {"budget": {"layers": 0.5}, "reconstruct": "dense"}},
            "reconstruct fits projections that lose channels, and units names only layer",
        ),
        ({"prune": {"budget": {"layers": 0.5, "parameters": 0.5}}}, "; got layers, parameters"),
        (
            {"prune": {"budget": {"channels": 0.1}, "units": ["gqa_group"]}},
            "prune: the budget is in ffn_channel but units names gqa_group",
        ),
        ({"prune": {"allocation": "global"}}, "prune: allocation: global gives every layer its own width; it needs"),
        ({"prune": {"shape": "ragged"}}, "prune.shape: input should be 'uniform' or 'uneven' (got 'ragged')"),
        ({"prune": {"min_keep_ratio": 1.0}}, "prune.min_keep_ratio: input should be less than 1"),
        ({"prune": {"multiple_of": 0}}, "prune.multiple_of"),
        (
            {"prune": {"vocabulary": {"min_count": 0}}},
            "prune.vocabulary.min_count: input should be greater",
        ),
        ({"prune": {"vocabulary": {"coverage": 1.5}}}, "prune.vocabulary.coverage: input should be less than or equal"),
        (
            {"prune": {"vocabulary": {"threshold": "rare"}}},
            "prune.vocabulary.threshold: input should be a valid",
        ),
        ({"prune": {"vocabulary": {"min_count": 1, "size": 9}}}, "coverage, size; got min_count, size"),
        (
            {"prune": {"vocabulary": {"keep_characters": ["greek"]}}},
            "prune.vocabulary.keep_characters: cannot read 'greek' as a range of characters; write for example U+0370",
        ),
        ({"prune": {"vocabulary": {"keep_characters": ["U+03FF-U+0370"]}}}, "as a range of characters"),
        (
            {"prune": {"vocabulary": {}, "units": ["ffn_channel"]}},
            "a vocabulary section but units names only ffn",
        ),
        (
            {"prune": {"units": ["vocabulary"], "budget": {"channels": 0.1}}},
            "prune: the budget is in ffn_channel but units names vocabulary",
        ),
        (
            {"prune": {"units": ["vocabulary"], "budget": {"threshold": 0.1}}},
            "budget.threshold is for units of layers; for token ids set vocabulary.threshold",
        ),
        (
            {"prune": {"units": ["vocabulary"], "budget": {"bytes": 9}, "vocabulary": {"size": 9}}},
            "both the budget and the rule under vocabulary say how many token ids stay",
        ),
        ({"evaluate": {"choices": {"a/b": "q.jsonl"}}}, "evaluate.choices: name 'a/b' of a set of questions must be"),
        ({"evaluate": {"choices": {"a": {}}}}, "evaluate.choices.a.path: field required"),
        (
            {"evaluate": {"choices": {"a": {"path": "q", "style": "letter", "prompt": "{question}"}}}},
            "evaluate.choices.a: style letter scores A, B, C ..., but the prompt does not list them",
        ),
        ({"evaluate": {"controls": ["worst"]}}, "evaluate.controls.0: input should be 'random' or 'reversed'"),
        ({"export": "gguf"}, "export: input should be a valid list (got 'gguf')"),
        (
            {"export": [3]},
            "export.0: name a target, such as gguf, or give a mapping such as {to: gguf, quantize: Q8_0}",
        ),
        ({"export": [{"quantize": "F16"}]}, "export.0.to: field required"),
        ({"export": [{"to": "gguf", "quantise": "F16"}]}, "unknown key at export.0.quantise: 'quantise'. Did you mean"),
        (
            {"export": [{"to": "gguf", "round_to_fit": "much"}]},
            "export.0.round_to_fit: input should be a valid boolean",
        ),
        (
            {"prune": {"combine": "union"}},
            "prune.combine: union needs two texts that decide, and there is",
        ),
        ({"prune": {"combine": "union", "mix": {"a": 1.0, "b": 2.0}}}, "prune: mix weighs texts as one, and combine"),
        (
            {"prune": {"combine": "union", "budget": {"layers": 0.2}}},
            "gqa_group and query_head; units names layer; use combine: mean",
        ),
        ({"recover": {"buckets": ["nowhere"]}}, "recover.buckets names 'nowhere', which is no domain; there are"),
        ({"dtype": "int8"}, "dtype: input should be 'auto', 'float32'"),
    ],
)
def test_impossible_values_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    """Every rule names the place, the rule and what was received."""
    assert words in refusal(**changes)


def test_all_mistakes_are_reported_together() -> None:
    """Two mistakes take one round, not two."""
    message = refusal(dtype="int8", calibrate={"block_size": 4})
    assert message.startswith("recipe cannot be used:\n")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("400MB", 400_000_000),
        ("1.5GiB", 1_610_612_736),
        (" 1.5 gib ", 1_610_612_736),
        (".5kb", 500),
        ("12", 12),
        ("12B", 12),
        ("3k", 3000),
        ("3Ki", 3072),
        ("2g", 2_000_000_000),
    ],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    """Decimal and binary units, any case, with and without the B."""
    assert parse_bytes(text) == size
    assert prune(budget={"bytes": text}).budget.bytes == size


def test_plain_numbers_are_bytes() -> None:
    """A size without quotes is a number already."""
    assert parse_bytes(12) == 12
    assert prune(budget={"bytes": 4e8}).budget.bytes == 400_000_000


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "3 TB", "3ib", "1,5GB", "."])
def test_other_sizes_are_refused_with_an_example(text: str) -> None:
    """What cannot be a size is answered with one that is."""
    with pytest.raises(ValueError, match=r"write for example 400MB or 1.5GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("name", "value"), THRESHOLD_PRESETS.items())
def test_threshold_presets_are_numbers(name: str, value: float) -> None:
    """A named threshold is the number it stands for."""
    assert prune(budget={"threshold": name}).budget.threshold == value
    assert prune(budget={"threshold": value}).budget.threshold == value


def test_shares_of_units_may_be_asked_for_together() -> None:
    """These budget keys do not contradict each other."""
    both = prune(budget={"channels": 0.1, "groups": 0.5})
    assert both.layer_kinds() == ["ffn_channel", "gqa_group"]
    deep = prune(budget={"channels": 0.1, "layers": 0.5, "ffn": 0.1}, shape="uneven")
    assert deep.layer_kinds() == ["ffn", "ffn_channel", "layer"]
    assert (deep.block_kinds(), deep.width_kinds()) == (["ffn", "layer"], ["ffn_channel"])
    assert (deep.depth_method, deep.depth_options) == ("block_influence", {})


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ["ffn_channel"]),
        ({"budget": {"groups": 0.5}}, ["gqa_group"]),
        ({"budget": {"heads": 0.5}}, ["query_head"]),
        ({"budget": {"parameters": 0.5}}, ["ffn_channel"]),
        ({"budget": {"threshold": 0.5}, "units": ["gqa_group"]}, ["gqa_group"]),
        ({"vocabulary": {"min_count": 2}}, []),
        ({"units": ["vocabulary"]}, []),
        ({"units": ["vocabulary"], "budget": {"parameters": 0.1}}, []),
        ({"vocabulary": {}, "budget": {"parameters": 0.5}}, ["ffn_channel"]),
        ({"units": ["vocabulary", "ffn_channel"]}, ["ffn_channel"]),
        (
            {"budget": {"parameters": 0.5}, "units": ["gqa_group", "ffn_channel", "gqa_group"]},
            ["ffn_channel", "gqa_group"],
        ),
    ],
)
def test_layer_kinds_follow_from_budget_and_units(changes: dict[str, Any], kinds: list[str]) -> None:
    """Kinds come in a fixed order, once each, and FFN channels are the default."""
    assert prune(**changes).layer_kinds() == kinds


def test_the_vocabulary_is_cut_where_a_section_or_a_unit_names_it() -> None:
    """Either is enough; a tenth of the channels goes by default only where layers are cut at all."""
    assert prune().vocabulary_spec() is None
    assert prune(budget={"groups": 0.5}, units=["gqa_group"]).vocabulary_spec() is None
    assert prune(units=["vocabulary"]).vocabulary_spec() == VocabularySpec()
    alone = prune(vocabulary={"threshold": "paper"})
    assert alone.vocabulary_spec() == alone.vocabulary
    assert (alone.budget, alone.vocabulary and alone.vocabulary.rule()) == (None, {"threshold": 0.0})
    both = prune(units=["ffn_channel", "vocabulary"])
    assert (both.budget, both.vocabulary_spec()) == (Budget(channels=0.1), VocabularySpec())
    assert VocabularySpec().rule() == {}


@pytest.mark.parametrize(
    ("text", "points"),
    [("U+0370-U+03FF", (0x370, 0x3FF)), ("u+20ac", (0x20AC, 0x20AC)), ("é", (0xE9, 0xE9)), ("U+0 - U+7f", (0, 0x7F))],
)
def test_ranges_of_characters_are_read(text: str, points: tuple[int, int]) -> None:
    """Unicode's own notation, one code point, or the character itself."""
    assert parse_character_range(text) == points


def test_pruning_options_alone_are_checked_the_same_way() -> None:
    """The prune section by itself has the same rules and names the same places."""
    assert parse_prune({"method": "random", "budget": {"groups": 0.5}}).layer_kinds() == ["gqa_group"]
    with pytest.raises(ConfigError, match=r"unknown key at prune\.budget\.chanels: .* Did you mean 'channels'"):
        parse_prune({"budget": {"chanels": 0.5}})
    with pytest.raises(ConfigError, match=r"these pruning options cannot be used:\n  prune\.seed: input should be"):
        parse_prune({"seed": "x"})


def write(folder: Path, text: str) -> Path:
    """Return a recipe file with the given text."""
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


BASE = "model: m\ndomain: {medical: a.txt}\n"


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a string; here it is the threshold that was meant, in files and in overrides."""
    loaded = load_recipe(write(tmp_path, BASE + "prune: {budget: {threshold: 1e-3}, options: {x: -2E+2, y: 1e3x}}\n"))
    assert loaded.prune.budget.threshold == 1e-3
    assert loaded.prune.options == {"x": -200.0, "y": "1e3x"}
    assert parse_override("prune.budget.threshold=1e-3") == ("prune.budget.threshold", 1e-3)
    assert yaml.safe_load("1e-3") == "1e-3", "the stock loader is not changed"


def test_overrides_are_applied_on_top(tmp_path: Path) -> None:
    """Dotted keys replace values and make missing parents; the rest of the recipe stays."""
    path = write(tmp_path, BASE + "prune: {method: random, seed: 1}\n")
    loaded = load_recipe(
        path, {"prune.seed": 5, "prune.budget": {"groups": 0.5}, "calibrate.batch_size": 2, "output": "elsewhere"}
    )
    assert (loaded.prune.method, loaded.prune.seed, loaded.prune.budget.groups) == ("random", 5, 0.5)
    assert (loaded.calibrate.batch_size, loaded.output) == (2, "elsewhere")
    assert load_recipe(path).prune.seed == 1


def test_an_override_through_something_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    """The message names the key and what stands in its way."""
    with pytest.raises(ConfigError, match=r"cannot set model\.name: model is not a mapping in this recipe, but 'm'"):
        load_recipe(write(tmp_path, BASE), {"model.name": "x"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prune.seed=3", ("prune.seed", 3)),
        (" output = runs/a=b", ("output", "runs/a=b")),
        ("evaluate.controls=[random, reversed]", ("evaluate.controls", ["random", "reversed"])),
        ("prune.budget={channels: 0.2}", ("prune.budget", {"channels": 0.2})),
        ("calibrate.max_tokens=null", ("calibrate.max_tokens", None)),
    ],
)
def test_override_values_are_yaml(text: str, expected: tuple[str, Any]) -> None:
    """Numbers, lists, mappings and null keep their type on the command line."""
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["prune.seed", "=3", "  =3"])
def test_an_override_without_key_and_value_is_refused(text: str) -> None:
    """The form is shown."""
    with pytest.raises(ConfigError, match="write key=value, for example"):
        parse_override(text)


def test_an_override_whose_value_is_not_yaml_is_refused() -> None:
    """Broken YAML is a user's mistake, not a stack trace."""
    with pytest.raises(ConfigError, match="cannot read the value in 'a=\\["):
        parse_override("a=[1")


def test_a_missing_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """The path is named, and so is where to find a recipe; a folder is no recipe either."""
    for path in (tmp_path / "no.yml", tmp_path):
        with pytest.raises(ConfigError, match=r"does not exist.*examples/"):
            load_recipe(path)


@pytest.mark.parametrize("content", [b"model: [", b"model: \xff\xfe"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    """Broken syntax and a broken encoding name the file."""
    path = tmp_path / "recipe.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yml is not valid YAML"):
        load_recipe(path)


def test_an_empty_file_is_not_a_recipe(tmp_path: Path) -> None:
    """An empty YAML file is refused as what it is, with or without overrides."""
    with pytest.raises(ConfigError, match=r"must be a mapping of keys .* got NoneType"):
        load_recipe(write(tmp_path, ""), {"model": "m"})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"general": {"calibration": ["a", "b"], "test": "c"}, "device": "cpu"},
        {"calibrate": {"max_tokens": None}, "evaluate": {"max_tokens": None}},
        {"prune": {"budget": {"threshold": "mild"}, "shape": "uneven", "options": {"at": "linear", "x": None}}},
        {"prune": {"budget": {"bytes": "1GiB"}, "units": ["gqa_group"]}, "domain": {"médical": "ü.txt"}},
    ],
    ids=["minimal", "explicit splits", "all the text", "options", "bytes"],
)
def test_yaml_and_back_is_the_same_recipe(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Writing a recipe with every default and reading it again changes nothing."""
    if "domain" in changes:
        changes = {**changes, "domain": {"medical": "ü.txt"}}
    done = recipe(**changes)
    text = done.to_yaml()
    assert load_recipe(write(tmp_path, text)) == done
    assert "block_size: 512" in text
    assert "\\" not in text


def test_a_mixture_has_weights_of_any_scale_or_is_refused() -> None:
    """Weights are above 0 and finite; buckets and mix exclude each other; the vocabulary alone has no use for a mix."""
    assert prune(mix={"medical": 8, "general": 2}).mix == {"medical": 8.0, "general": 2.0}
    assert "prune.mix.general: input should be greater than 0 (got 0)" in refusal(prune={"mix": {"general": 0}})
    assert "prune.mix.medical: input should be a finite number" in refusal(prune={"mix": {"medical": float("inf")}})
    assert "prune.mix: dictionary should have at least 1 item" in refusal(prune={"mix": {}})
    both = refusal(prune={"mix": {"medical": 1}, "buckets": ["medical"]})
    assert "prune: both buckets and mix say which text decides" in both
    assert "only the vocabulary is cut" in refusal(prune={"mix": {"medical": 1}, "units": ["vocabulary"]})
