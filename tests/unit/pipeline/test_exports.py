"""Exports in a run: what they need of the widths, and what is refused before the model is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.allocate import Request
from secateur.allocate.widths import kept_multiple
from secateur.errors import ConfigError, ExportError
from secateur.families.geometry import build_geometry
from secateur.families.loader import families, family_of
from secateur.pipeline.exports import ExportStage, check_exports, sample_plan, width_note, with_export_widths
from secateur.pipeline.texts import Texts
from secateur.recipe import Recipe, parse_recipe
from secateur.records.plan import LayerPlan, Plan
from secateur.shrink import shrink_config
from secateur.store.checkpoints import load_tokenizer, resolve_model
from secateur.store.run_folder import RunFolder
from tests.conftest import DENSE, pico_config
from tests.pico import save_model_folder
from tests.pruning import plan_keeping, prune
from tests.unit.export.test_gguf import folder_of

Q8 = [{"to": "gguf", "quantize": "Q8_0"}]
FFN, GROUP = "ffn_channel", "gqa_group"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What resolve_model remembers is forgotten with the test."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


def recipe(export: list[Any], **prune: Any) -> Recipe:
    """Return a recipe with exports."""
    return parse_recipe({"model": "m", "domain": {"d": "d.txt"}, "prune": prune, "export": export})


def stage(folder: Path, asked: Recipe) -> ExportStage:
    """Return the exports of a recipe on a model folder."""
    checkpoint = resolve_model(str(folder))
    texts = Texts(asked, checkpoint, lambda: load_tokenizer(checkpoint), lambda _: (), frozenset, False)
    return ExportStage(asked.export, asked.prune, ["d"], checkpoint, texts, RunFolder.open(folder.parent / "run"))


def check(folder: Path, asked: Recipe) -> None:
    """Check a recipe's exports against a model folder as a run does."""
    made = stage(folder, asked)
    made.check_model(lambda: load_tokenizer(made.checkpoint))


# -- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("export", "prune_options", "size", "expected"),
    [
        (Q8, {}, 96, 32),
        (Q8, {"shape": "uneven"}, 96, 32),
        (["gguf"], {}, 96, "auto"),
        (["gguf"], {"shape": "uneven"}, 96, 32),
        ([], {"shape": "uneven"}, 96, "auto"),
        (Q8, {}, 1536, "auto"),
        (["gguf"], {"shape": "uneven"}, 1536, "auto"),
        (Q8, {}, 1500, 32),
        (Q8, {"multiple_of": 64}, 96, 64),
        (Q8, {"units": ["gqa_group"], "budget": {"groups": 0.5}}, 96, "auto"),
    ],
)
def test_widths_are_planned_for_the_engine(
    export: list[Any], prune_options: dict[str, Any], size: int, expected: object
) -> None:
    """Whole quantisation blocks; where the automatic multiple fits already, the recipe stays the same recipe."""
    asked = recipe(export, **prune_options)
    config = pico_config(families()["llama"], intermediate_size=size)
    geometry = build_geometry(families()["llama"], config.to_dict())
    planned = with_export_widths(asked, geometry)
    assert planned.prune.multiple_of == expected
    assert (planned is asked) == (asked.prune.multiple_of == expected)
    note = width_note(asked, planned)
    assert bool(note) == (planned is not asked)
    assert not note or "FFN widths are multiples of 32, because the result is exported as gguf" in note[0]
    if export == Q8 and "gqa_group" not in prune_options.get("units", ()):
        request = Request.of(planned.prune, bytes_per_parameter=4.0)
        assert kept_multiple(geometry, FFN, geometry.num_units(FFN), request) % 32 == 0


def test_widths_that_do_not_fit_are_refused_with_those_that_do() -> None:
    """Before anything is resolved; a type that takes any width, or zeros, may have them."""
    with pytest.raises(
        ConfigError,
        match=r"prune.multiple_of is 40, and export gguf Q8_0 needs FFN widths that are multiples of 32. Set it to 64, "
        r"another multiple of 32, or auto, or export another type. Or set round_to_fit: true",
    ):
        check_exports(recipe(Q8, multiple_of=40))
    check_exports(recipe(["gguf"], multiple_of=40))
    check_exports(recipe(Q8, multiple_of=64))
    check_exports(recipe([{**Q8[0], "round_to_fit": True}], multiple_of=40))
    check_exports(recipe(Q8, multiple_of=40, units=["gqa_group"], budget={"groups": 0.5}))


def test_names_are_resolved_first() -> None:
    """Unknown targets and types, and the same export twice."""
    with pytest.raises(ConfigError, match=r"unknown export target 'ggfu'. Did you mean 'gguf'"):
        check_exports(recipe(["ggfu"]))
    with pytest.raises(ConfigError, match=r"unknown type of export target gguf 'Q8'. Did you mean 'Q8_0'"):
        check_exports(recipe([{"to": "gguf", "quantize": "Q8"}]))
    with pytest.raises(ConfigError, match="export names gguf F16 more than once"):
        check_exports(recipe(["gguf", {"to": "gguf", "quantize": "f16"}]))


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_a_sample_is_what_the_recipe_may_make(name: str, shape: str) -> None:
    """Its configuration is that of a pruned model: layers differ only where they may, and something goes."""
    family = families()[name]
    config = pico_config(family).to_dict()
    geometry = build_geometry(family, config)
    cuttable = [kind for kind in (FFN, GROUP) if not geometry.why_fixed(kind)]
    asked = recipe([], shape=shape, units=cuttable, budget={"parameters": 0.2}).prune
    plan = sample_plan(geometry, asked, 8)
    kept = {kind: [len(layer.keep) for layer in layers] for kind, layers in plan.layers.items()}
    assert set(kept) == set(cuttable)
    for kind, counts in kept.items():
        width = geometry.axes[kind][0].reader_width
        assert all(count * width % 8 == 0 for count in counts)
        assert counts[0] < geometry.axes[kind][0].num_units
    assert (plan.shape == "uneven") == (shape == "uneven") == (len(set(kept[FFN])) > 1)
    assert ("per_layer_config" in shrink_config(config, plan, geometry)) == (shape == "uneven")


def test_a_sample_without_sub_layers_keeps_the_first_layers_whole() -> None:
    """Attention goes from the last layer and a feed-forward from the one before; whole layers are left alone."""
    family = families()["llama"]
    geometry = build_geometry(family, pico_config(family, num_hidden_layers=4).to_dict())
    asked = recipe([], shape="uneven", units=["attention", "ffn", "layer"], budget={"parameters": 0.3}).prune
    plan = sample_plan(geometry, asked, 1)
    assert plan.removed_sublayers("attention") == (3,) and plan.removed_sublayers("ffn") == (2,)
    assert plan.removed_layers == () and not plan.narrows


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gpt2"])
def test_layers_that_differ_are_refused_where_the_engine_has_no_place_for_them(name: str, tmp_path: Path) -> None:
    """Only for shape uneven: the same recipe in uniform shape passes."""
    folder = folder_of(tmp_path, name)
    check(folder, recipe(["gguf"], budget={"channels": 0.3}))
    check(folder, recipe(["gguf"], shape="uneven", units=["layer"], budget={"layers": 0.3}))
    with pytest.raises(ExportError, match=rf"export gguf F16: llama.cpp loads no {name} model with layers that differ"):
        check(folder, recipe(["gguf"], shape="uneven", budget={"channels": 0.3}))


def test_an_untied_qwen3_may_be_uniform(tmp_path: Path) -> None:
    """Its uneven architecture ties the head to the embedding."""
    folder = folder_of(tmp_path, "qwen3", tie_word_embeddings=False)
    check(folder, recipe(["gguf"]))
    with pytest.raises(ExportError, match="whose output head is not tied"):
        check(folder, recipe(["gguf"], shape="uneven"))


def test_a_family_that_the_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    """Whatever the shape."""
    unknown = next(name for name in ("opt", "phi", "gpt_neox") if name in families())
    model = AutoModelForCausalLM.from_config(pico_config(families()[unknown], vocab_size=512))
    folder = save_model_folder(tmp_path / "model")
    model.save_pretrained(folder)
    with pytest.raises(ExportError, match=rf"export gguf F16: models of type '{unknown}' cannot be written as GGUF"):
        check(folder, recipe(["gguf"]))


def test_a_tokenizer_that_the_engine_does_not_have_is_refused(tmp_path: Path) -> None:
    """Before any text is run through the model."""
    folder = save_model_folder(tmp_path / "model")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(ExportError, match="tokenizers of type WordLevel cannot be written as GGUF"):
        check(folder, recipe(["gguf"]))


def test_rows_that_no_cut_changes_are_refused(tmp_path: Path) -> None:
    """A hidden size that is no whole number of blocks; other types may have it."""
    folder = save_model_folder(tmp_path / "model", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    check(folder, recipe(["gguf"]))
    with pytest.raises(ExportError, match=r"have rows of 48 \(nearest that fit: 32 or 64\)"):
        check(folder, recipe(Q8))


# -- the plan --------------------------------------------------------------------------------------------------------


def planned(folder: Path, keep: dict[str, list[int]], shape: str) -> Plan:
    """Return a plan that keeps the first so many units in each layer."""
    geometry = resolve_model(str(folder)).geometry
    return plan_keeping(geometry, {kind: [list(range(n)) for n in counts] for kind, counts in keep.items()}, shape)


def test_a_plan_is_refused_with_its_layers_and_the_nearest_widths(tmp_path: Path) -> None:
    """Known from shapes alone, before a weight is read; a plan that fits passes and is not looked at again."""
    folder = save_model_folder(tmp_path / "model")
    made = stage(folder, recipe(Q8, shape="uneven"))
    tokenizer = load_tokenizer(made.checkpoint)
    with pytest.raises(ExportError, match=r"export gguf Q8_0: .*blk.1.ffn_down.weight have rows of 40 .*32 or 64"):
        made.check_plan(planned(folder, {FFN: [64, 40]}, "uneven"), lambda: tokenizer)
    fits = planned(folder, {FFN: [64, 32]}, "uneven")
    made.check_plan(fits, lambda: tokenizer)

    def not_again() -> Any:
        raise AssertionError("the tokenizer was asked for again")

    made.check_plan(fits, not_again)
    with pytest.raises(AssertionError):
        made.check_plan(planned(folder, {FFN: [32, 32]}, "uneven"), not_again)


def test_constants_of_a_plan_do_not_matter(tmp_path: Path) -> None:
    """They become biases, which need weights; shapes do not."""
    folder = save_model_folder(tmp_path / "model", mlp_bias=True)
    made = stage(folder, recipe(["gguf"]))
    plan = planned(folder, {FFN: [64, 64]}, "uniform")
    entries = tuple(LayerPlan(e.num_units, e.keep, constants=((80, 0.5),)) for e in plan.layers[FFN])
    made.check_plan(replace(plan, layers={FFN: entries}), lambda: load_tokenizer(made.checkpoint))


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_planned_facts_are_those_of_the_pruned_model(shape: str, tmp_path: Path) -> None:
    """Names and shapes of the parameters, and every size in the configuration."""
    folder = save_model_folder(tmp_path / "model")
    made = stage(folder, recipe(["gguf"], shape=shape))
    keep = {FFN: [64, 64 if shape == "uniform" else 32], GROUP: [2, 2 if shape == "uniform" else 3]}
    plan = planned(folder, keep, shape)
    facts = made._facts(plan, None)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pruned = prune(dense, plan, made.checkpoint.geometry)
    assert facts.shapes == {name: tuple(value.shape) for name, value in pruned.named_parameters()}
    assert family_of(str(facts.config["model_type"])).name == "llama"
    for key in ("intermediate_size", "num_key_value_heads", "num_hidden_layers", "vocab_size"):
        assert facts.config[key] == pruned.config.to_dict()[key]
