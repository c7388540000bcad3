"""Training blocks: which tokens count, and in which order blocks come."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import CorpusError
from secateur.recover.examples import EpochOrder, TrainingExamples, collate
from tests.blocks import HandMadeBlocks, hand_made_blocks


def test_items_are_the_blocks_of_all_texts_in_order() -> None:
    """A second text's blocks come after the first's, with the learned tokens that were predicted."""
    first, second = hand_made_blocks(seed=0), hand_made_blocks(seed=1)
    examples = TrainingExamples([first, second])
    items = collate([examples[i] for i in range(len(examples))])
    batches = [next(source.batches(10)) for source in (first, second)]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(items[name], torch.cat([getattr(batch, name) for batch in batches]))
    assert torch.equal(items["learned"], torch.cat([batch.predicted for batch in batches]))
    assert items["index"].tolist() == list(range(8))
    assert examples.num_blocks == 8
    assert examples.num_tokens == first.num_tokens + second.num_tokens == int(items["num_tokens"].sum())
    assert examples.num_learned == int(items["learned"].sum())
    assert examples.block_size == 16


def test_a_mask_narrows_what_is_learned() -> None:
    """Learned are the predicted tokens of the mask, never the first of a piece."""
    blocks = hand_made_blocks()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[1, :3] = True
    examples = TrainingExamples([blocks], [mask])
    assert examples.num_learned == 2
    assert examples[1]["learned"].nonzero()[:, 0].tolist() == [1, 2]
    assert examples.fingerprint != TrainingExamples([blocks]).fingerprint


def test_the_fingerprint_tells_texts_apart() -> None:
    """Other text, another order of texts, and other masks have other fingerprints."""
    one = HandMadeBlocks([[1, 2, 3]], [[0]], 4, "one")
    two = HandMadeBlocks([[1, 2, 3]], [[0]], 4, "two")
    learned = torch.tensor([[True, True, False, True]])
    made = [
        TrainingExamples([one]),
        TrainingExamples([two]),
        TrainingExamples([one, two]),
        TrainingExamples([two, one]),
        TrainingExamples([one, two], [learned, None]),
        TrainingExamples([one, two], [None, learned]),
    ]
    assert len({examples.fingerprint for examples in made}) == len(made)
    assert TrainingExamples([one, two]).fingerprint == made[2].fingerprint


def test_text_that_teaches_nothing_is_refused() -> None:
    """No blocks, nothing learned, different block sizes and a mask that does not fit are said."""
    blocks = hand_made_blocks()
    with pytest.raises(CorpusError, match="0 blocks"):
        TrainingExamples([HandMadeBlocks([], [], 16)])
    with pytest.raises(CorpusError, match=r"none of its 50 tokens counts"):
        TrainingExamples([blocks], [torch.zeros(4, 16, dtype=torch.bool)])
    with pytest.raises(CorpusError, match=r"blocks of \[4, 16\] tokens"):
        TrainingExamples([blocks, HandMadeBlocks([[1, 2]], [[0]], 4)])
    with pytest.raises(CorpusError, match=r"shape \(3, 16\), and the text \(4, 16\)"):
        TrainingExamples([blocks], [torch.ones(3, 16, dtype=torch.bool)])


def test_every_epoch_has_its_own_order_of_all_blocks() -> None:
    """The order is a permutation that depends on the seed and the epoch and on nothing else."""
    order = EpochOrder(20, seed=3)
    first, again = [*order], [*order]
    order.epoch = 1
    second = [*order]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first == again != second
    assert [*EpochOrder(20, seed=4)] not in (first, second)
