"""Small fast tokenizers, built here: byte-level BPE over a few sentences, without and with a BOS."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The patient was given ten milligrams of the drug every morning.",
    "A randomised trial of the drug found no effect on the heart.",
    "Naïve Bayes classifies café menus; 東京 is a city.",
]


def build_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; with ``bos`` its post-processor puts ``<s>`` before and ``</s>`` after."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
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
