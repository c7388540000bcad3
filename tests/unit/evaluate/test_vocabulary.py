"""The price of a smaller vocabulary: both losses of one pass are those of models built to have them."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from secateur.corpus.packing import load_split
from secateur.corpus.resegment import resegment
from secateur.errors import CheckpointError, CorpusError
from secateur.evaluate import evaluate_resegmented, evaluate_text
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.evaluation import paired_bits_per_byte, paired_difference
from tests.blocks import HandMadeBlocks, hand_made_blocks, random_documents
from tests.conftest import PICO_SIZES, pico_model
from tests.unit.corpus.conftest import build_tokenizer

NUM_IDS = PICO_SIZES["vocab_size"]
NUM_KEPT = 40


def kept_ids(seed: int = 0) -> torch.Tensor:
    """Return some ids of the pico models, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_IDS, generator=generator)[:NUM_KEPT].sort().values


def sliced(model: Any, family: Family, keep: torch.Tensor) -> Any:
    """Return the model with only the kept rows of its embedding and head, and nothing else changed."""
    small = pico_model(family, vocab_size=len(keep))
    rows = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    state = {
        name: parameter[keep] if id(parameter) in rows else parameter for name, parameter in model.named_parameters()
    }
    missing = small.load_state_dict({name: value.detach() for name, value in state.items()}, strict=False)
    assert not missing.unexpected_keys
    small.tie_weights()
    return small


def renamed(blocks: HandMadeBlocks, keep: torch.Tensor) -> HandMadeBlocks:
    """Return the same blocks in the dense model's ids."""
    texts = [keep[torch.tensor(list(text))].tolist() for text in blocks.texts]
    return HandMadeBlocks(texts, blocks.rows, blocks.block_size)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_the_restricted_loss_is_that_of_a_sliced_model(name: str) -> None:
    """Fewer rows of embedding and head, and nothing else: the loss is the dense model's among the kept ids."""
    family, keep = families()[name], kept_ids()
    model, blocks = pico_model(family), hand_made_blocks(NUM_KEPT)
    _, restricted = evaluate_resegmented(model, blocks, family, keep, batch_size=3, num_excluded=2)
    expected = evaluate_text(sliced(model, family, keep), blocks, family, batch_size=2, num_excluded=2)
    rel = 1e-6 if "gemma" in family.name else 1e-9
    assert restricted.document_nll == pytest.approx(expected.document_nll, rel=rel)
    assert restricted.nll_per_token == pytest.approx(expected.nll_per_token, rel=rel)
    assert restricted.nll_stderr == pytest.approx(expected.nll_stderr, rel=1e-5)
    for field in ("document_tokens", "document_bytes", "num_tokens", "num_bytes", "num_excluded", "corpus_fingerprint"):
        assert getattr(restricted, field) == getattr(expected, field)


def test_the_full_loss_is_the_dense_models() -> None:
    """With all ids as outcomes the dense model is measured as ever, on its own ids."""
    family, keep = families()["llama"], kept_ids()
    model, blocks = pico_model(family), hand_made_blocks(NUM_KEPT)
    full, _ = evaluate_resegmented(model, blocks, family, keep)
    expected = evaluate_text(model, renamed(blocks, keep), family)
    assert full.document_nll == pytest.approx(expected.document_nll, rel=1e-12)
    assert full.document_tokens == expected.document_tokens


def test_keeping_every_id_changes_nothing(family: Family) -> None:
    """In every family: both losses are the dense model's, even when new ids are in another order."""
    model, blocks = pico_model(family), hand_made_blocks()
    for keep in (torch.arange(NUM_IDS), torch.tensor(random.Random(0).sample(range(NUM_IDS), NUM_IDS))):
        expected = evaluate_text(model, renamed(blocks, keep), family)
        for score in evaluate_resegmented(model, blocks, family, keep):
            assert score.document_nll == pytest.approx(expected.document_nll, rel=1e-9)
            assert score.document_bytes == expected.document_bytes


def test_fewer_outcomes_never_cost_more() -> None:
    """Per document, the loss among the kept ids is below that among all."""
    family = families()["llama"]
    model, blocks = pico_model(family), hand_made_blocks(NUM_KEPT)
    for seed in range(3):
        full, restricted = evaluate_resegmented(model, blocks, family, kept_ids(seed))
        assert all(a < b for a, b in zip(restricted.document_nll, full.document_nll, strict=True))
        assert paired_difference(restricted, full).mean < 0


def test_scores_under_two_segmentations_are_compared() -> None:
    """The dense model on its own tokens and on resegmented text: the same documents and bytes, so they pair up."""
    words = "the patient was given ten milligrams of the drug naïve 東京 every morning".split()
    texts = [" ".join(words[(n * 5 + step) % len(words)] for step in range(3 + n % 11)) + f" {n}" for n in range(40)]
    for bos in (True, False):
        many, few = build_tokenizer(bos=bos), build_tokenizer(bos=bos, num_merges=15)
        blocks = load_split(texts, "calibration", many, block_size=10, max_tokens=300, keep_text=True)
        other = resegment(blocks, few)
        keep = torch.arange(len(few))
        assert many.convert_ids_to_tokens(keep.tolist()) == few.convert_ids_to_tokens(keep.tolist())
        family = families()["llama"]
        model = pico_model(family, vocab_size=len(many))
        dense = evaluate_text(model, blocks, family)
        for score in evaluate_resegmented(model, other, family, keep):
            assert score.document_bytes == dense.document_bytes
            assert score.num_tokens > dense.num_tokens
            delta = sum(score.document_nll) - sum(dense.document_nll)
            assert paired_difference(score, dense).mean == pytest.approx(delta / dense.num_tokens)
            difference = paired_bits_per_byte(score, dense).mean
            assert difference == pytest.approx(score.bits_per_byte - dense.bits_per_byte)
        again = resegment(blocks, many)
        for score in evaluate_resegmented(model, again, family, torch.arange(len(many))):
            assert score.document_nll == pytest.approx(dense.document_nll, rel=1e-12)


def test_both_scores_say_what_was_measured() -> None:
    """One pass: the same text, speed and tokens for both, and progress is told once of every token."""
    told: list[Any] = []

    class Listener:
        def advance(self, amount: int) -> None:
            told.append(amount)

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Any:
        told.append((label, total, unit))
        yield Listener()

    family, blocks = families()["llama"], hand_made_blocks(NUM_KEPT)
    model = pico_model(family).train()
    full, restricted = evaluate_resegmented(
        model, blocks, family, kept_ids(), batch_size=3, progress=progress, label="measure"
    )
    assert told[0] == ("measure", blocks.num_tokens, "tokens")
    assert sum(told[1:]) == blocks.num_tokens
    assert full.tokens_per_s == restricted.tokens_per_s > 0
    assert not model.training


def test_what_cannot_be_measured_is_refused() -> None:
    """NaN in either loss, and text without a predicted token."""
    family = families()["llama"]
    model, keep = pico_model(family), kept_ids()
    with pytest.raises(CorpusError, match="every document is a single token"):
        evaluate_resegmented(model, HandMadeBlocks(random_documents([1], NUM_KEPT), [[0]], 4), family, keep)
    removed = next(id for id in range(NUM_IDS) if id not in keep)
    with torch.no_grad():
        model.lm_head.weight[removed, 0] = float("nan")
    with pytest.raises(CheckpointError, match="loss is not finite"):
        evaluate_resegmented(model, hand_made_blocks(NUM_KEPT), family, keep)
