"""Family files are found, parsed strictly, and chosen by model type."""

from __future__ import annotations

from importlib import resources

import pytest

from secateur.errors import FamilyError
from secateur.families.loader import UNEVEN_PREFIX, dense_model_type, families, family_of, parse_family

TOY = """
name = "toy"
model_types = ["toy"]
layers = "model.layers"
vocabulary = ["model.embed_tokens", "lm_head"]
[dimensions]
num_layers = "depth"
vocab_size = "vocab_size"
intermediate_size = "ffn"
num_attention_heads = "heads"
[parts]
ffn = ["mlp"]
[blocks]
attention = {modules = ["attn"], norms = ["norm"]}
ffn = {modules = ["mlp"]}
[[axes]]
name = "ffn_channel"
count = "intermediate_size"
reader = "mlp.down"
members = [{module = "mlp.up", side = "out"}, {module = "mlp.down", side = "in"}]
config = {ffn = "units"}
[[axes]]
name = "gqa_group"
count = "num_attention_heads"
reader = "attn.o"
fixed = "the configuration cannot say that heads were removed"
[[axes]]
name = "query_head"
count = "num_attention_heads"
reader = "attn.o"
fixed = "every key/value head has one query head"
"""


def test_a_text_becomes_a_family() -> None:
    """The minimal file of a family is short."""
    family = parse_family(TOY, "toy.toml")
    assert family.name == "toy"
    assert [axis.name for axis in family.axes] == ["ffn_channel", "gqa_group", "query_head"]


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("[dimensions]", "hidden = 3"),
        ('name = "toy"', 'comment = "unread"'),
        ('reader = "mlp.down"', 'input_space = "hidden"'),
        ('module = "mlp.up"', 'rows = "1"'),
        ("[parts]", 'mlp = ["mlp"]'),
        ("[blocks]", 'experts = {modules = ["moe"]}'),
    ],
)
def test_a_key_that_nobody_reads_is_refused(where: str, key: str) -> None:
    """An unread key anywhere in the file is an error that names the file."""
    separator = ", " if where.startswith("module") else "\n"
    with pytest.raises(FamilyError, match=r"family file toy\.toml: "):
        parse_family(TOY.replace(where, where + separator + key, 1), "toy.toml")


def test_a_file_that_is_not_toml_is_refused() -> None:
    """Broken syntax names the file too."""
    with pytest.raises(FamilyError, match=r"family file broken\.toml: "):
        parse_family("name = ", "broken.toml")


def test_every_file_is_a_family_of_its_own_name() -> None:
    """One TOML per family, named as the family; no model type belongs to two."""
    folder = resources.files("secateur.families") / "data"
    files = {entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")}
    assert set(families()) == files
    types = [name for family in families().values() for name in family.model_types]
    assert len(types) == len(set(types))


def test_families_are_read_once() -> None:
    """The registry is the same object every time."""
    assert families() is families()


def test_a_model_type_finds_its_family_dense_or_uneven() -> None:
    """Our own uneven model types belong to the family of the dense one."""
    assert family_of("llama").name == "llama"
    assert family_of(UNEVEN_PREFIX + "llama").name == "llama"
    assert dense_model_type("pruned_gpt2") == "gpt2"
    assert dense_model_type("gpt2") == "gpt2"


def test_an_unknown_model_type_suggests_and_lists() -> None:
    """The nearest supported type is suggested, all are listed, and the way to add one is named."""
    with pytest.raises(FamilyError) as caught:
        family_of("lama")
    message = str(caught.value)
    assert message.startswith("unknown model type 'lama'. Did you mean 'llama'? Known: ")
    for name in families():
        assert families()[name].model_types[0] in message
    assert "one TOML file" in message


def test_an_unknown_family_name_suggests_too() -> None:
    """The registry itself refuses in the same way."""
    with pytest.raises(FamilyError, match=r"unknown model family 'gpt_2'. Did you mean 'gpt2'"):
        families()["gpt_2"]
