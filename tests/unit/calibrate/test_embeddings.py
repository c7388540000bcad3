"""A document's embedding is the plain mean of its tokens' final hidden states, however it is cut and batched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from secateur.calibrate.embeddings import embed_documents
from secateur.errors import CheckpointError
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.blocks import BlockBatch
from tests.blocks import HandMadeBlocks, hand_made_blocks, random_documents
from tests.conftest import pico_model


def test_equals_the_mean_of_each_document_run_alone(family: Family) -> None:
    """In every family: neighbours in the block, padding, the batch size and the first token have no part in it."""
    blocks = hand_made_blocks()
    model = pico_model(family)
    found = embed_documents(model, blocks, family, batch_size=3)
    assert found.shape == (7, 48) and found.dtype == torch.float32
    torch.testing.assert_close(embed_documents(model, blocks, family, batch_size=1), found, rtol=0, atol=1e-6)
    for document, ids in enumerate(blocks.texts):
        with torch.no_grad():
            alone = model.base_model(input_ids=torch.tensor([ids]))[0][0, 1:].mean(0)
        torch.testing.assert_close(found[document], alone.float(), rtol=0, atol=1e-6)


@dataclass
class CutBlocks(HandMadeBlocks):
    """Blocks in which several pieces are of one document."""

    document_of: tuple[int, ...] = ()

    @property
    def documents(self) -> torch.Tensor:
        """One made-up hash per document."""
        return torch.arange(max(self.document_of) + 1)

    def batches(self, batch_size: int) -> Iterator[BlockBatch]:
        """Yield batches whose pieces are numbered by their documents."""
        number = torch.tensor([*self.document_of, -1])
        for batch in super().batches(batch_size):
            yield replace(batch, document=number[batch.document])


def test_pieces_count_by_their_tokens() -> None:
    """A long piece weighs more than a short one, also where they are in different batches."""
    family = families()["llama"]
    texts = random_documents([16, 3, 9, 5])
    cut = CutBlocks(texts, [[0], [1, 2], [3]], 16, document_of=(0, 1, 0, 0))
    model = pico_model(family)
    found = embed_documents(model, cut, family, batch_size=1)
    states = []
    for place in (0, 2, 3):
        with torch.no_grad():
            states.append(model.base_model(input_ids=torch.tensor([texts[place]]))[0][0, 1:])
    torch.testing.assert_close(found[0], torch.cat(states).mean(0).float(), rtol=0, atol=1e-6)


def test_states_that_are_not_finite_are_refused() -> None:
    family = families()["llama"]
    model = pico_model(family)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="output of the last layer's norm are not finite"):
        embed_documents(model, hand_made_blocks(), family)
