"""Padding with zeros: the padded model says what the small one does, and is of a shape that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import CheckpointError, ExportError
from secateur.export.padding import PaddingReport, padded_folder, plan_padding
from secateur.families.loader import families, family_of
from secateur.families.schema import Family
from secateur.records.units import FFN_CHANNEL, GQA_GROUP, QUERY_HEAD
from secateur.store.checkpoints import resolve_model, save_model
from tests.conftest import geometry_of, pico_config
from tests.contract.test_blocks import CUTS, Cut, deep_model, kept_of, pruned_by, token_ids
from tests.pico import pico_tokenizer
from tests.pruning import Kept, logits, plan_keeping, prune

LLAMA = families()["llama"]
PADDED_CUTS: dict[str, Cut] = {"attention": ([3], [], False), "ffn": ([], [0, 3], False), "all": CUTS["all"]}


def saved(model: Any, folder: Path) -> Path:
    """Save a model as a run does, with what lies beside it, and return the folder."""
    folder.mkdir()
    save_model(model, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Small\n\nimport secateur\n")
    (folder / "LICENSE").write_text("Do what you like.")
    (folder / "secateur_plan.json").write_text("{}")
    return folder


def keeping(family: Family, kept: Kept, **extra: Any) -> Any:
    """Return a model of four layers pruned to the given units."""
    model = deep_model(family, torch.float32, **extra)
    geometry = geometry_of(model, family)
    return prune(model, plan_keeping(geometry, kept, "uneven"), geometry)


def widths(family: Family) -> Any:
    """Return a model with odd FFN widths and, where they can go, fewer groups in some layers."""
    model = deep_model(family, torch.float32)
    geometry = geometry_of(model, family)
    kept = {**kept_of(geometry, ([], [], True)), FFN_CHANNEL: [list(range(n)) for n in (64, 37, 1, 50)]}
    return prune(model, plan_keeping(geometry, kept, "uneven"), geometry)


def pad(model: Any, folder: Path, **options: Any) -> tuple[Any, PaddingReport, float]:
    """Return the padded model as stock transformers loads it, the report, and the largest difference of a logit."""
    report = padded_folder(saved(model, folder / "small"), folder / "padded", **options)
    padded = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32).eval()
    return padded, report, float((logits(padded, token_ids()) - logits(model, token_ids())).abs().max())


@pytest.mark.parametrize("cut", ["widths", *PADDED_CUTS])
def test_a_uniform_padded_model_is_a_stock_model_that_says_the_same(family: Family, cut: str, tmp_path: Path) -> None:
    """In every family, whatever was cut: stock class, no code in the folder, equal logits, the promised sizes."""
    if cut == "widths":
        model = widths(family)
    else:
        dense = deep_model(family, torch.float32)
        model = pruned_by(dense, geometry_of(dense, family), PADDED_CUTS[cut])
    padded, report, difference = pad(model, tmp_path, uniform=True)
    assert difference <= 1e-5
    assert type(padded).__module__.startswith("transformers.models.")
    assert padded.config.model_type == family.model_types[0]
    assert not list(report.path.glob("*.py")) and not hasattr(padded.config, "auto_map")
    before, after = geometry_of(model, family), geometry_of(padded, family)
    for layer, sizes in enumerate(report.layers):
        for kind in (FFN_CHANNEL, GQA_GROUP, QUERY_HEAD):
            assert sizes.before[kind] == before.axes[kind][layer].num_units
            assert sizes.after[kind] == after.axes[kind][layer].num_units >= max(1, sizes.before[kind])
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in padded.parameters()) > report.parameters_before


def test_widths_alone_are_rounded_up(family: Family, tmp_path: Path) -> None:
    """Layers that differ stay different, removed ones removed, each width the next multiple."""
    model = widths(family)
    padded, report, difference = pad(model, tmp_path, multiple=16)
    assert difference <= 1e-5
    assert [sizes.after[FFN_CHANNEL] for sizes in report.layers] == [64, 48, 16, 64]
    assert geometry_of(padded, family).num_units(FFN_CHANNEL) == [64, 48, 16, 64]
    assert geometry_of(padded, family).num_units(GQA_GROUP) == geometry_of(model, family).num_units(GQA_GROUP)
    assert resolve_model(str(report.path)).config["model_type"] == "pruned_" + family.model_types[0]


def test_query_heads_stay_with_their_group(tmp_path: Path) -> None:
    """Where layers differ in groups and in heads per group at once, and the same product hides another layout."""
    model = keeping(
        LLAMA,
        {QUERY_HEAD: [list(range(12)), [0, 4, 8], [0, 1, 4, 5, 8, 9], list(range(12))]},
        num_attention_heads=12,
        head_dim=4,
    )
    geometry = geometry_of(model, LLAMA)
    groups = [[0, 1], [0, 1, 2], [0, 1, 2], [0]]  # heads now: 8, 3, 6 and 4
    model = prune(model, plan_keeping(geometry, {GQA_GROUP: groups}, "uneven"), geometry)
    padded, report, difference = pad(model, tmp_path, uniform=True)
    assert [sizes.before[QUERY_HEAD] for sizes in report.layers] == [8, 3, 6, 4]
    assert report.layers[0].after == {FFN_CHANNEL: 64, GQA_GROUP: 3, QUERY_HEAD: 12}
    assert difference <= 1e-5
    assert padded.config.head_dim == 4


def test_the_next_head_count_that_the_stock_configuration_allows_is_taken(tmp_path: Path) -> None:
    """48 channels cannot have 5 heads, so 6 are made; the report says so."""
    model = keeping(
        LLAMA,
        {GQA_GROUP: [[0], [0, 1, 2, 3, 4], [1], [2]]},
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    padded, report, difference = pad(model, tmp_path, uniform=True)
    assert (padded.config.num_key_value_heads, padded.config.num_attention_heads) == (6, 6)
    assert difference <= 1e-5
    assert any("need 5 key/value heads and 5 query heads; 6 and 6" in note for note in report.notes)


def test_an_even_model_can_be_padded_too(tmp_path: Path) -> None:
    """The stock type stays; a folder that fits already comes out as it was, and says so."""
    model = deep_model(LLAMA, torch.float32, intermediate_size=50)
    padded, report, difference = pad(model, tmp_path, multiple=32)
    assert (padded.config.intermediate_size, padded.config.model_type) == (64, "llama")
    assert difference <= 1e-5
    again = padded_folder(report.path, tmp_path / "again", multiple=32)
    assert again.parameters_before == again.parameters_after
    assert again.notes == ("All FFN widths were multiples of 32 already; nothing was added.",)


def test_weights_keep_their_type_and_the_rest_comes_along(tmp_path: Path) -> None:
    """bfloat16 stays; tokenizer, generation configuration, plan and licence too; the card says what was done."""
    model = deep_model(LLAMA, torch.float32, vocab_size=len(pico_tokenizer()))
    model = pruned_by(model, geometry_of(model, LLAMA), PADDED_CUTS["ffn"]).to(torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    folder = saved(model, tmp_path / "small")
    pico_tokenizer().save_pretrained(folder)
    report = padded_folder(folder, tmp_path / "padded", uniform=True, multiple=48)
    assert {value.dtype for value in load_file(report.path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(report.path)("The patient") == AutoTokenizer.from_pretrained(folder)(
        "The patient"
    )
    assert AutoModelForCausalLM.from_pretrained(report.path).generation_config.max_new_tokens == 7
    for name in ("LICENSE", "secateur_plan.json", "generation_config.json", "tokenizer.json"):
        assert (report.path / name).read_bytes() == (folder / name).read_bytes()
    card = (report.path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n**Padded with zeros.** All layers were given the same sizes")
    assert "96 FFN channels" in card and "# Small" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["padded", "small"]


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    """A folder whose weights are spread over files is padded as any other."""
    model = widths(LLAMA)
    folder = saved(model, tmp_path / "small")
    (folder / "model.safetensors").unlink()
    save_model(model, folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    report = padded_folder(folder, tmp_path / "padded", uniform=True)
    padded = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32)
    assert float((logits(padded, token_ids()) - logits(model, token_ids())).abs().max()) <= 1e-5


def test_a_padded_model_that_says_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay under the name before stays."""
    from secateur.export import padding

    folder = saved(widths(LLAMA), tmp_path / "small")
    (tmp_path / "padded").mkdir()
    (tmp_path / "padded" / "earlier").write_text("x")

    def save_wrong(model: Any, work: Path) -> None:
        save_model(model, work)
        tensors = load_file(work / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] += 0.1
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(padding, "save_model", save_wrong)
    with pytest.raises(ExportError, match="logits differ by"):
        padded_folder(folder, tmp_path / "padded", uniform=True)
    assert [file.name for file in (tmp_path / "padded").iterdir()] == ["earlier"]


def test_what_cannot_be_padded_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """Nothing asked for, the model itself as target, no model there."""
    folder = saved(widths(LLAMA), tmp_path / "small")
    for options in ({}, {"multiple": 1}, {"multiple": 0, "uniform": True}):
        with pytest.raises(ExportError, match=r"changes nothing\. Give multiple=2 or more, or uniform=True"):
            padded_folder(folder, tmp_path / "padded", **options)
    with pytest.raises(ExportError, match="Give another folder"):
        padded_folder(folder, tmp_path / "." / "small", uniform=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        padded_folder(tmp_path / "nothing", tmp_path / "padded", uniform=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_sizes_that_the_stock_class_refuses_are_an_export_error(tmp_path: Path) -> None:
    """Phi-3's long contexts tie the rotary settings to the dense number of heads; its words are in the message."""
    family = families()["phi3"]
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 500.0}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 32, "max_position_embeddings": 64}
    model = keeping(family, {GQA_GROUP: [[0], [1], [0], [2]]}, **options)
    folder = saved(model, tmp_path / "small")
    with pytest.raises(ExportError, match=r"phi3 refuses the padded sizes: (.|\n)*length"):
        padded_folder(folder, tmp_path / "padded", uniform=True)
    assert padded_folder(folder, tmp_path / "padded", multiple=48).layers[0].after[FFN_CHANNEL] == 96


def test_the_plan_looks_at_the_configuration_alone(family: Family) -> None:
    """Sizes and configuration are known without a weight; planning again what was planned adds nothing."""
    config = widths(family).config.to_dict()
    padding = plan_padding(json.loads(json.dumps(config)), multiple=8, uniform=True)
    assert family_of(padding.config["model_type"]) == family and "per_layer_config" not in padding.config
    again = plan_padding(padding.config, multiple=8, uniform=True)
    assert [sizes.after for sizes in again.layers] == [sizes.before for sizes in again.layers]


def test_models_with_experts_are_not_filled_up() -> None:
    """A router would choose experts of zeros; what to do instead is said."""
    config = pico_config(families()["mixtral"]).to_dict()
    with pytest.raises(ExportError, match=r"a router would choose empty ones\. Use shape: uniform"):
        plan_padding(config, multiple=8)
