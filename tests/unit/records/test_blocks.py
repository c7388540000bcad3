"""Block batches count real tokens only."""

from __future__ import annotations

from secateur.records.blocks import TokenBlocks
from tests.blocks import hand_made_blocks, lay_blocks


def test_padding_is_not_counted() -> None:
    """The number of tokens is the number of real ones."""
    batch = lay_blocks([[1, 2, 3], [4, 5]], [[0, 1], [1]], 6)
    assert batch.num_tokens == 7
    assert batch.input_ids.shape == (2, 6)


def test_hand_made_blocks_are_token_blocks() -> None:
    """The blocks that these tests lay by hand fit the protocol and add up."""
    blocks = hand_made_blocks()
    assert isinstance(blocks, TokenBlocks)
    assert blocks.num_tokens == sum(batch.num_tokens for batch in blocks.batches(3)) == 50
    assert blocks.num_blocks == sum(len(batch.input_ids) for batch in blocks.batches(3))
    assert len(blocks.documents) == 7
