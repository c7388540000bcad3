"""transformers tokenizers made smaller: same text, same settings, whole after reloading; and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from secateur.errors import ExportError, TokenizerError
from secateur.families.schema import Family
from secateur.store.tokenizers import (
    PROBES,
    check_smaller_tokenizer,
    compare_reloaded_tokenizer,
    encode,
    save_tokenizer,
    smaller_tokenizer,
    template_texts,
    term_ids,
    token_ids,
    tokenizer_data,
    tokenizer_fingerprint,
)
from secateur.vocabulary import read_tokenizer
from tests.conftest import pico_config
from tests.tiny_tokenizers import KINDS, tiny_tokenizer, training_texts

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}{% if tools %}call a tool{% endif %}"
)
TEXTS = training_texts()[:60]

every_kind = pytest.mark.parametrize("kind", KINDS)


def dense_tokenizer(kind: str, **settings: Any) -> PreTrainedTokenizerFast:
    """Return a transformers tokenizer of a kind."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    backend = Tokenizer.from_str(tiny_tokenizer(kind).to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **settings})


def ids_to_keep(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    """Return ids that write some texts, with all that must stay."""
    graph = read_tokenizer(tokenizer_data(tokenizer))
    return sorted(graph.closed(graph.alphabet | graph.added | token_ids(tokenizer, texts)))


@every_kind
def test_a_smaller_tokenizer_reads_and_writes_as_before(kind: str) -> None:
    """Text it was made for has the same tokens, every text comes back as before, and the ids are fewer."""
    dense = dense_tokenizer(kind)
    keep = ids_to_keep(dense, TEXTS)
    smaller = smaller_tokenizer(dense, keep)
    assert len(smaller) == len(keep) < len(dense)
    assert check_smaller_tokenizer(dense, smaller, keep, (*TEXTS, *training_texts()[60:])) >= len(TEXTS)
    assert [keep[token] for token in encode(smaller, TEXTS[0], add_special_tokens=True)] == encode(
        dense, TEXTS[0], add_special_tokens=True
    )


@every_kind
def test_it_is_the_same_after_saving_and_loading(kind: str, tmp_path: Path) -> None:
    """The folder holds the generic class and no stale vocabulary files, and gives equal ids."""
    dense = dense_tokenizer(kind)
    smaller = smaller_tokenizer(dense, ids_to_keep(dense, TEXTS))
    save_tokenizer(smaller, tmp_path)
    compare_reloaded_tokenizer(smaller, tmp_path, TEXTS)
    assert not {"vocab.json", "merges.txt", "tokenizer.model"} & {file.name for file in tmp_path.iterdir()}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_settings_stay() -> None:
    """Chat template, sides, length and named tokens are those of the dense tokenizer; their ids are new."""
    dense = dense_tokenizer(
        "byte_level", chat_template=TEMPLATE, model_max_length=321, padding_side="left", truncation_side="left"
    )
    dense.model_input_names = ["input_ids"]
    keep = ids_to_keep(dense, TEXTS)
    smaller = smaller_tokenizer(dense, keep)
    assert smaller.chat_template == TEMPLATE
    assert (smaller.model_max_length, smaller.padding_side, smaller.truncation_side) == (321, "left", "left")
    assert smaller.model_input_names == ["input_ids"]
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(smaller, name) == getattr(dense, name)
        assert keep[getattr(smaller, f"{name}_id")] == getattr(dense, f"{name}_id")
    messages = [{"role": "user", "content": TEXTS[0]}]
    both = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (dense, smaller)]
    assert both[0] == both[1]


def test_the_text_of_a_chat_template_is_found() -> None:
    """Conversations are rendered where the template allows, and its literals are taken from every branch."""
    dense = dense_tokenizer("byte_level", chat_template=TEMPLATE)
    texts = template_texts(dense)
    assert "<s>user\na</s><s>assistant\n" in texts
    assert "<s>user\na</s><s>assistant\na</s><s>user\na</s>" in texts
    assert "call a tool" in texts
    assert template_texts(dense_tokenizer("byte_level")) == []


def test_a_template_that_cannot_be_parsed_only_loses_its_literals() -> None:
    """What is rendered counts; a template nobody can read has no text."""
    assert template_texts(dense_tokenizer("byte_level", chat_template="{% if %}")) == []


@every_kind
def test_terms_have_ids_or_are_listed(kind: str) -> None:
    """A term's ids write it both alone and after a space; what comes back otherwise is listed."""
    dense = dense_tokenizer(kind)
    ids, lost = term_ids(dense, TEXTS[0].split()[:3])
    assert lost == []
    kept = set(ids_to_keep(dense, []))
    assert {*encode(dense, TEXTS[0].split()[0]), *encode(dense, " " + TEXTS[0].split()[0])} <= ids
    assert ids - kept


def test_a_term_that_cannot_be_written_is_listed() -> None:
    """A tokenizer without byte fallback loses characters that it does not know."""
    ids, lost = term_ids(dense_tokenizer("unigram"), ["ab", "\U0001f9ec", "cd"])
    assert lost == ["\U0001f9ec"]
    assert ids


def test_a_tokenizer_that_differs_is_found() -> None:
    """Other text, or other tokens for text whose tokens stay, is an error that shows the text."""
    dense = dense_tokenizer("byte_level")
    keep = ids_to_keep(dense, TEXTS)
    smaller = smaller_tokenizer(dense, keep)
    with pytest.raises(TokenizerError, match=r"cuts .* otherwise, although its tokens stayed"):
        check_smaller_tokenizer(dense, smaller, [token + 1 for token in keep], TEXTS)
    other = dense_tokenizer("unigram")
    with pytest.raises(TokenizerError, match=r"does not give .* back as the dense one does"):
        check_smaller_tokenizer(dense, other, keep, TEXTS)


def test_a_folder_with_another_tokenizer_is_found(tmp_path: Path) -> None:
    """Ids and template are compared after reloading, and a folder without a tokenizer is no folder."""
    dense = dense_tokenizer("byte_level")
    with pytest.raises(ExportError, match="does not load again"):
        compare_reloaded_tokenizer(dense, tmp_path, ())
    dense_tokenizer("gemma").save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="gives other ids"):
        compare_reloaded_tokenizer(dense, tmp_path, PROBES)
    dense_tokenizer("byte_level", chat_template=TEMPLATE).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="another chat template"):
        compare_reloaded_tokenizer(dense, tmp_path, PROBES)


def test_a_stock_class_may_be_made_smaller(tmp_path: Path) -> None:
    """A model's own tokenizer class builds its parts anew; the smaller one reads them from its file."""
    from transformers import GPT2Tokenizer

    data = tokenizer_data(dense_tokenizer("byte_level"))
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in data["model"]["merges"]]
    dense = GPT2Tokenizer(vocab=data["model"]["vocab"], merges=merges, unk_token="<unk>", bos_token="<s>")
    keep = ids_to_keep(dense, TEXTS)
    smaller = smaller_tokenizer(dense, keep)
    assert check_smaller_tokenizer(dense, smaller, keep, TEXTS) >= len(TEXTS)
    save_tokenizer(smaller, tmp_path)
    assert encode(AutoTokenizer.from_pretrained(tmp_path), TEXTS[0]) == encode(smaller, TEXTS[0])


KIND_OF_FAMILY = {
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "llama": "sentencepiece_bpe",
    "mistral": "sentencepiece_bpe",
}
"""What models of these families ship; the others have byte-level BPE."""


def test_the_class_that_a_model_type_loads_may_be_made_smaller(family: Family, tmp_path: Path) -> None:
    """Transformers chooses a tokenizer's class by the model's type too, and that class must load ours to equal ids."""
    kind = KIND_OF_FAMILY.get(family.name, "byte_level")
    written = dense_tokenizer(kind)
    config = pico_config(family, vocab_size=len(written))
    for name in ("dense", "smaller"):
        config.save_pretrained(tmp_path / name)
    written.save_pretrained(tmp_path / "dense")
    dense = AutoTokenizer.from_pretrained(tmp_path / "dense")
    keep = ids_to_keep(dense, TEXTS)
    smaller = smaller_tokenizer(dense, keep)
    check_smaller_tokenizer(dense, smaller, keep, TEXTS)
    save_tokenizer(smaller, tmp_path / "smaller")
    compare_reloaded_tokenizer(smaller, tmp_path / "smaller", TEXTS)


class _Slow:
    is_fast = False


class _Custom:
    """A pre-tokenizer written in Python."""

    def split(self, index: int, text: NormalizedString) -> list[NormalizedString]:
        return [text]

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(self.split)


def test_what_has_no_plain_form_is_refused_by_name() -> None:
    """Slow tokenizers and parts written in Python cannot be rebuilt."""
    with pytest.raises(TokenizerError, match=r"_Slow has no tokenizer.json \(it is a slow one\).*leave vocabulary out"):
        tokenizer_data(_Slow())
    backend = Tokenizer(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>"))
    custom = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    custom.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Custom())
    with pytest.raises(TokenizerError, match=r"cannot be written as tokenizer.json.*custom pre-tokenizer"):
        tokenizer_data(custom)


def test_the_fingerprint_ignores_padding_and_truncation() -> None:
    """Calling a tokenizer changes its state but not its identity."""
    dense = dense_tokenizer("byte_level")
    before = tokenizer_fingerprint(tokenizer_data(dense))
    dense(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer_data(dense)) == before
    assert tokenizer_fingerprint(tokenizer_data(dense_tokenizer("gemma"))) != before
