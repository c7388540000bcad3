"""Token counts equal a plain loop over the split's documents, each once, and add up over shards."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from secateur.corpus import counting
from secateur.corpus.counting import count_split_tokens
from secateur.corpus.packing import load_split
from secateur.corpus.split import document_hash, select_documents
from secateur.errors import CorpusError
from secateur.recipe import CorpusSpec, SplitRatios
from secateur.records.token_counts import TokenCounts, merge_token_counts

NUM_IDS = 330
"""More than the tokenizer's 320: a model's head may be padded."""

WORDS = "the patient was given ten milligrams of a drug and naïve 東京 effects 😀 every morning".split()
TEXTS = [
    " ".join(WORDS[(number * 7 + step) % len(WORDS)] for step in range(1 + number % 9)) + f" {number}"
    for number in range(60)
]


def count(tokenizer: Any, source: Any = TEXTS, **options: Any) -> TokenCounts:
    """Return the counts of the calibration split unless the options say otherwise."""
    return count_split_tokens(source, tokenizer=tokenizer, **{"split": "calibration", "num_ids": NUM_IDS, **options})


def chosen(texts: Iterable[str] = TEXTS, exclude: Iterable[int] = ()) -> list[str]:
    """Return the calibration documents in reading order, each once."""
    wanted = set(
        select_documents(
            texts, split="calibration", ratios=SplitRatios(), max_bytes=None, exclude=frozenset(exclude)
        ).hashes
    )
    first: dict[int, str] = {}
    for text in texts:
        first.setdefault(document_hash(text), text)
    return [text for digest, text in first.items() if digest in wanted]


def check(found: TokenCounts, texts: list[str], tokenizer: Any) -> None:
    """Compare with a loop over single texts."""
    expected = Counter(
        id for text in texts for id in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    )
    assert len(found.counts) == NUM_IDS
    assert {id: n for id, n in enumerate(found.counts.tolist()) if n} == expected
    assert found.num_tokens == expected.total()
    assert found.num_bytes == sum(len(text.encode()) for text in texts)
    assert found.num_documents == len(texts)
    assert found.documents.tolist() == sorted(document_hash(text) for text in texts)


@pytest.fixture(params=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Both kinds of tokenizer."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


def test_counts_equal_a_plain_loop(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids, tokens, bytes, documents: those of the split's documents, without a BOS or an EOS."""
    check(count(tokenizer), chosen(), tokenizer)


@pytest.mark.parametrize(("documents", "characters"), [(1, 10**9), (7, 10**9), (10**9, 1), (10**9, 100)])
def test_batches_change_nothing(
    plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, documents: int, characters: int
) -> None:
    """However the documents fall into batches, the counts are the same."""
    whole = count(plain_tokenizer)
    monkeypatch.setattr(counting, "_BATCH_DOCUMENTS", documents)
    monkeypatch.setattr(counting, "_BATCH_CHARACTERS", characters)
    found = count(plain_tokenizer)
    assert torch.equal(found.counts, whole.counts)
    assert found.fingerprint == whole.fingerprint


def test_documents_are_those_of_load_split(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Counting sees the same split as calibrating does."""
    excluded = [document_hash(text) for text in chosen()[:4]]
    blocks = load_split(TEXTS, "calibration", plain_tokenizer, block_size=12, max_tokens=None, exclude=excluded)
    assert torch.equal(count(plain_tokenizer, exclude=excluded).documents, blocks.documents)


def test_copies_count_once_and_the_first_is_counted(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Copies that differ only in white space are one document; blank ones are none."""
    texts = ["", " \n", *TEXTS, *[text.replace(" ", "  ") for text in TEXTS], *TEXTS]
    check(count(plain_tokenizer, texts), chosen(), plain_tokenizer)


def test_excluded_documents_are_not_counted(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Hashes that are excluded leave the counts; a split of nothing else is refused."""
    excluded = [document_hash(text) for text in chosen()[::3]]
    check(count(plain_tokenizer, exclude=excluded), chosen(exclude=excluded), plain_tokenizer)
    everything = [document_hash(text) for text in TEXTS]
    with pytest.raises(CorpusError, match=rf"gave 0 for split calibration \({len(chosen())} were excluded\)"):
        count(plain_tokenizer, exclude=everything)


@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_a_limit_stops_after_the_document_that_reaches_it(
    plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """In reading order, whole documents, however far the batch had read on."""
    monkeypatch.setattr(counting, "_BATCH_DOCUMENTS", batch)
    lengths = [len(ids) for ids in plain_tokenizer(chosen(), verbose=False)["input_ids"]]
    for taken in (1, 2, 9):
        reached = sum(lengths[:taken])
        for limit in (reached, reached - lengths[taken - 1] + 1):
            check(count(plain_tokenizer, max_tokens=limit), chosen()[:taken], plain_tokenizer)
    check(count(plain_tokenizer, max_tokens=sum(lengths) + 1), chosen(), plain_tokenizer)


def test_two_shards_merge_to_the_whole(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Counts of disjoint halves add up to those of the whole."""
    merged = merge_token_counts(count(plain_tokenizer, TEXTS[:23]), count(plain_tokenizer, TEXTS[23:]))
    check(merged, chosen(), plain_tokenizer)


def test_splits_of_a_spec(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A spec's text is split by its ratios; explicit files are taken whole."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    by_hash = CorpusSpec(path=str(path))
    check(count(plain_tokenizer, by_hash), chosen(), plain_tokenizer)
    explicit = CorpusSpec(calibration=str(path), test=str(path))
    check(count(plain_tokenizer, explicit), TEXTS, plain_tokenizer)
    assert count(plain_tokenizer, explicit, split="test").num_documents == len(TEXTS)


def test_the_fingerprint_says_what_was_counted(
    plain_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The same for the same documents in any order; another for other documents, spacing, split or tokenizer."""
    first = count(plain_tokenizer)
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    plain_tokenizer.backend_tokenizer.enable_padding(length=30)
    assert count(plain_tokenizer, shuffled).fingerprint == first.fingerprint
    others = {
        first.fingerprint,
        count(plain_tokenizer, TEXTS[:-5]).fingerprint,
        count(plain_tokenizer, [text.replace(" ", "  ") for text in TEXTS]).fingerprint,
        count(plain_tokenizer, split="test").fingerprint,
        count(bos_tokenizer).fingerprint,
    }
    assert len(others) == 5


def test_progress_is_told_of_every_counted_token(
    plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener can show how far the count is."""
    told: list[Any] = []

    class Listener:
        def advance(self, amount: int) -> None:
            told.append(amount)

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Any:
        told.append((label, total, unit))
        yield Listener()

    monkeypatch.setattr(counting, "_BATCH_DOCUMENTS", 3)
    found = count(plain_tokenizer, name="medical", max_tokens=100, progress=progress)
    assert told[0] == ("count tokens of medical", 100, "tokens")
    assert sum(told[1:]) == found.num_tokens >= 100
    assert len(told) > 2


def test_a_tokenizer_of_another_model_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A token id that the model does not have is named with the remedy."""
    with pytest.raises(CorpusError, match="but the model has 100 ids: tokenizer and model belong to different models"):
        count(plain_tokenizer, num_ids=100)


def test_errors_are_those_of_load_split(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """No text, no text for the split, one string, half a surrogate pair, a slow tokenizer."""
    for source, options, message in (
        ([], {}, "corpus 'corpus' is empty: no record holds any text"),
        (["", " \n"], {"name": "medical"}, "corpus 'medical' is empty"),
        ([chosen()[0]], {"split": "test"}, "1 documents gave 0 for split test; give more text or set splits"),
        ("some text", {}, "corpus 'corpus' is one string"),
        (["a", "b\udc00"], {}, "document 2 of corpus 'corpus' holds half a surrogate pair"),
    ):
        with pytest.raises(CorpusError, match=message):
            count(plain_tokenizer, source, **options)
    with pytest.raises(CorpusError, match="tokenizer object is not a fast one"):
        count(object())
