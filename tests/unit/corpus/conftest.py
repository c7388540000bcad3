"""Small fast tokenizers, built here: byte-level BPE over a few sentences, and one like SentencePiece; BOS or none."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The patient was given ten milligrams of the drug every morning.",
    "A randomised trial of the drug found no effect on the heart.",
    "Naïve Bayes classifies café menus; 東京 is a city.",
]


def build_tokenizer(*, bos: bool, num_merges: int = 61) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; with ``bos`` its post-processor puts ``<s>`` before and ``</s>`` after.

    With fewer merges the tokens that are left keep their ids.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3 + 256 + num_merges,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return _wrapped(backend, bos)


def build_sentencepiece(*, bos: bool, vocab_size: int = 340) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer that writes ``▁`` for spaces and before a text; other letters are byte tokens."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=[], show_progress=False
    )
    backend.train_from_iterator([word for line in SENTENCES for word in line.split()], trainer)
    data = json.loads(backend.to_str())
    data["model"]["vocab"] |= {name: len(data["model"]["vocab"]) + byte for byte, name in enumerate(bytes_)}
    return _wrapped(Tokenizer.from_str(json.dumps(data)), bos)


def _wrapped(backend: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Adds no special token by itself; its model length is 16, so that a warning about length would show."""
    return build_tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Puts ``<s>`` (id 1) before a text and ``</s>`` (id 2) after it."""
    return build_tokenizer(bos=True)
