"""Losses on packed text equal a loop over single documents, whatever the packing, and the error bars are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from secateur.errors import CheckpointError, CorpusError
from secateur.evaluate import evaluate_text
from secateur.evaluate.perplexity import token_nll
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.evaluation import TextScore
from tests.blocks import HandMadeBlocks, hand_made_blocks, lay_blocks, random_documents
from tests.conftest import pico_model


def reference_nll(model: Any, ids: Sequence[int]) -> float:
    """Return the summed loss of one document alone, in float64, in nats."""
    tokens = torch.tensor([list(ids)])
    with torch.inference_mode():
        logits = model(tokens).logits[0, :-1].double()
    return float(cross_entropy(logits, tokens[0, 1:], reduction="sum"))


def check_against_loop(score: TextScore, model: Any, texts: Sequence[Sequence[int]], rel: float) -> None:
    """Compare every number of a score with the loop over single documents."""
    losses = [reference_nll(model, ids) for ids in texts]
    counts = [len(ids) - 1 for ids in texts]
    assert score.document_nll == pytest.approx(losses, rel=rel)
    assert score.document_tokens == score.document_bytes == tuple(counts)
    assert (score.num_tokens, score.num_bytes, score.num_documents) == (sum(counts), sum(counts), len(texts))
    mean = sum(losses) / sum(counts)
    assert score.nll_per_token == pytest.approx(mean, rel=rel)
    assert score.perplexity == pytest.approx(math.exp(mean), rel=10 * rel)
    assert score.bits_per_byte == pytest.approx(mean / math.log(2), rel=rel)
    n = len(texts)
    spread = sum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    assert score.nll_stderr == pytest.approx(math.sqrt(spread * n / (n - 1)) / sum(counts), rel=1e-6)
    assert score.bits_per_byte_stderr == pytest.approx(score.nll_stderr / math.log(2), rel=1e-6)


def test_packed_losses_equal_single_documents(family: Family) -> None:
    """In every family: packing, padding and neighbours change nothing. Bytes are one per predicted token.

    The models compute in float64, but for Gemma's norms, which are in float32 whatever the model's dtype.
    """
    model, blocks = pico_model(family), hand_made_blocks()
    score = evaluate_text(model, blocks, family, batch_size=2)
    check_against_loop(score, model, blocks.texts, rel=1e-6 if "gemma" in family.name else 1e-10)


def test_losses_equal_transformers_own() -> None:
    """Transformers computes the same mean loss when it is given labels (it does so in float32)."""
    family = families()["qwen2"]
    model, texts = pico_model(family), random_documents([12])
    score = evaluate_text(model, HandMadeBlocks(texts, [[0]], 16), family)
    tokens = torch.tensor(texts)
    with torch.inference_mode():
        own = float(model(tokens, labels=tokens).loss)
    assert score.nll_per_token == pytest.approx(own, rel=1e-6)
    assert score.nll_stderr == math.inf


def test_soft_capped_logits_are_what_is_measured() -> None:
    """Where a family caps its logits, the loss is that of the capped ones."""
    family = families()["gemma2"]
    model, texts = pico_model(family, final_logit_softcapping=1.5), random_documents([14, 9], seed=3)
    score = evaluate_text(model, HandMadeBlocks(texts, [[0], [1]], 16), family)
    losses, uncapped = [], []
    for ids in texts:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            raw = model.lm_head(model.model(tokens)[0])[0, :-1]
        assert float(raw.abs().max()) > 1.5
        losses.append(float(cross_entropy(1.5 * torch.tanh(raw / 1.5), tokens[0, 1:], reduction="sum")))
        uncapped.append(float(cross_entropy(raw, tokens[0, 1:], reduction="sum")))
    assert score.document_nll == pytest.approx(losses, rel=1e-6)
    assert score.document_nll != pytest.approx(uncapped, rel=1e-2)


def test_narrow_logits_are_summed_in_wide_numbers() -> None:
    """The loss is exact for the logits that the model gives: only they are rounded."""
    family, blocks = families()["llama"], hand_made_blocks()
    model = pico_model(family, torch.float32)
    check_against_loop(evaluate_text(model, blocks, family, batch_size=1), model, blocks.texts, rel=1e-5)
    model = pico_model(family, torch.bfloat16)
    score = evaluate_text(model, blocks, family, batch_size=1)
    assert score.document_nll == pytest.approx([reference_nll(model, ids) for ids in blocks.texts], rel=2e-2)


def test_the_batch_size_changes_nothing() -> None:
    """One block at a time or all at once: the same losses to float64 rounding."""
    family = families()["mistral"]
    model, blocks = pico_model(family), hand_made_blocks()
    scores = [evaluate_text(model, blocks, family, batch_size=size) for size in (1, 2, 3, 100)]
    for score in scores[1:]:
        assert score.document_nll == pytest.approx(scores[0].document_nll, rel=1e-12)
        assert score.num_tokens == scores[0].num_tokens


def test_neighbours_and_order_change_nothing() -> None:
    """The same documents laid into other blocks have the same losses."""
    family = families()["llama"]
    model, texts = pico_model(family), random_documents([5, 9, 4])
    first = evaluate_text(model, HandMadeBlocks(texts, [[0, 1], [2]], 16), family)
    second = evaluate_text(model, HandMadeBlocks(texts, [[2, 1], [0]], 20), family)
    assert first.document_nll == pytest.approx(second.document_nll, rel=1e-12)


def test_the_pieces_of_a_document_count_together() -> None:
    """A document that is cut into pieces is one unit for the error bar, with the losses and bytes of all of them."""
    family = families()["llama"]
    model, texts = pico_model(family), random_documents([6, 8])
    whole = evaluate_text(model, HandMadeBlocks(texts, [[0, 0], [1]], 16), family)
    assert whole.document_tokens == (10, 7)
    assert whole.document_nll[0] == pytest.approx(2 * reference_nll(model, texts[0]), rel=1e-10)
    assert whole.num_documents == 2
    assert whole.num_bytes == 17


def test_documents_without_a_predicted_token_do_not_count() -> None:
    """A single token predicts nothing; it is neither a document nor bytes of the score."""
    family = families()["llama"]
    model, texts = pico_model(family), random_documents([1, 6, 5])
    score = evaluate_text(model, HandMadeBlocks(texts, [[0, 1], [2]], 16), family)
    assert score.document_tokens == (5, 4)
    check_against_loop(score, model, texts[1:], rel=1e-10)
    with pytest.raises(CorpusError, match="every document is a single token"):
        evaluate_text(model, HandMadeBlocks(texts[:1], [[0]], 16), family)


def test_only_what_is_marked_as_predicted_counts() -> None:
    """Context is read and not measured; a document whose text has no bytes is not measured, whatever is predicted."""
    family = families()["llama"]
    model, texts = pico_model(family), random_documents([6, 5])

    class Contextual(HandMadeBlocks):
        """The same blocks, two context tokens per piece."""

        def batches(self, batch_size: int) -> Any:
            """Yield the same batches with another mark."""
            for batch in super().batches(batch_size):
                predicted = batch.predicted & (batch.position_ids > 1)
                yield replace(batch, predicted=predicted, piece_bytes=((0, 4), (1, 0)))

    score = evaluate_text(model, Contextual(texts, [[0, 1]], 16), family)
    assert (score.document_tokens, score.document_bytes, score.num_documents) == ((4,), (4,), 1)
    whole, start = reference_nll(model, texts[0]), reference_nll(model, texts[0][:2])
    assert score.document_nll == pytest.approx([whole - start], rel=1e-10)


def test_bits_per_byte_count_the_bytes_of_the_text() -> None:
    """Twice the bytes per token is half the bits per byte; perplexity does not care."""
    family = families()["llama"]
    model, blocks = pico_model(family), hand_made_blocks()

    class Wide(HandMadeBlocks):
        """The same blocks, two bytes per predicted token."""

        def batches(self, batch_size: int) -> Any:
            """Yield the same batches with twice the bytes."""
            for batch in super().batches(batch_size):
                yield replace(batch, piece_bytes=tuple((d, 2 * size) for d, size in batch.piece_bytes))

    narrow = evaluate_text(model, blocks, family)
    wide = evaluate_text(model, Wide(blocks.texts, blocks.rows, blocks.block_size), family)
    assert wide.num_bytes == 2 * narrow.num_bytes == sum(wide.document_bytes)
    assert wide.bits_per_byte == pytest.approx(narrow.bits_per_byte / 2, rel=1e-12)
    assert wide.bits_per_byte_stderr == pytest.approx(narrow.bits_per_byte_stderr / 2, rel=1e-9)
    assert wide.perplexity == narrow.perplexity


def test_a_loss_that_is_not_finite_is_refused() -> None:
    """NaN in, no number out."""
    family = families()["llama"]
    model = pico_model(family)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="loss is not finite"):
        evaluate_text(model, hand_made_blocks(), family)


def test_what_was_measured_is_noted() -> None:
    """Fingerprint, excluded documents and speed are part of the score; dropout is off."""
    family = families()["llama"]
    model = pico_model(family).train()
    score = evaluate_text(model, hand_made_blocks(), family, num_excluded=4)
    assert (score.corpus_fingerprint, score.num_excluded) == ("hand-made", 4)
    assert score.tokens_per_s > 0
    assert not model.training


def test_progress_is_told_of_every_token() -> None:
    """A listener can show how far the measurement is."""
    told: list[Any] = []

    class Listener:
        def advance(self, amount: int) -> None:
            told.append(amount)

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Any:
        told.append((label, total, unit))
        yield Listener()

    family, blocks = families()["llama"], hand_made_blocks()
    evaluate_text(pico_model(family), blocks, family, batch_size=3, progress=progress, label="measure")
    assert told[0] == ("measure", blocks.num_tokens, "tokens")
    assert sum(told[1:]) == blocks.num_tokens
    assert len(told) == 3


def test_the_first_token_of_a_piece_and_padding_are_not_predicted() -> None:
    """They have nothing before them."""
    batch = lay_blocks(random_documents([3, 2]), [[0, 1]], 8)
    assert batch.predicted.tolist() == [[False, True, True, False, True, False, False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("seq", [2, 33, 70])
def test_probability_is_shared_out_among_the_kept_ids(dtype: torch.dtype, seq: int) -> None:
    """With ``keep`` the loss is that of logits which have no other columns."""
    generator = torch.Generator().manual_seed(seq)
    logits = (4 * torch.randn(2, seq, 50, generator=generator)).to(dtype)
    keep = torch.randperm(50, generator=generator)[:20]
    ids = torch.randint(0, 20, (2, seq), generator=generator)
    wanted = torch.rand(2, seq, generator=generator) < 0.7
    wanted[:, 0] = False
    found = token_nll(logits, keep[ids], wanted, keep)
    torch.testing.assert_close(found, token_nll(logits[..., keep], ids, wanted), rtol=0, atol=0)
    assert (found <= token_nll(logits, keep[ids], wanted) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("seq", [2, 32, 33, 34, 70])
def test_token_losses_lose_nothing_to_narrow_logits(dtype: torch.dtype, seq: int) -> None:
    """Whatever the dtype of the logits and the length of the row, the loss is that of float64 arithmetic on them."""
    generator = torch.Generator().manual_seed(seq)
    logits = (20 + 4 * torch.randn(2, seq, 50, generator=generator)).to(dtype)
    ids = torch.randint(0, 50, (2, seq), generator=generator)
    wanted = torch.ones(2, seq, dtype=torch.bool)
    wanted[:, 0] = False
    expected = cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(token_nll(logits, ids, wanted).double(), expected, rtol=0, atol=tolerance)


def test_token_losses_are_in_row_order_and_survive_large_logits() -> None:
    """-log p from the logits one position before; a shift of all logits, however large, changes nothing."""
    logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    wanted = torch.tensor([[False, True, False, True], [False, False, True, False]])
    places = [(0, 1), (0, 3), (1, 2)]
    expected = [float(-logits[row, at - 1].log_softmax(-1)[ids[row, at]]) for row, at in places]
    assert token_nll(logits, ids, wanted).tolist() == pytest.approx(expected, rel=1e-12)
    assert token_nll(logits + 1e4, ids, wanted).tolist() == pytest.approx(expected, rel=1e-9)
