"""What is trained on: packed blocks with the tokens of each that are learned, kept in memory as integers.

Dims: ``blocks`` blocks in all, ``batch`` of them, ``seq`` tokens per block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from secateur.errors import CorpusError
from secateur.records.blocks import TokenBlocks
from secateur.store.artifacts import digest

_BLOCKS_AT_ONCE = 64


class TrainingExamples(Dataset[dict[str, Tensor]]):
    """The blocks of one or several texts; item ``i`` is block ``i``, texts one after another.

    Args:
        sources: packed texts, all of one block size and by one tokenizer.
        learned: per source which tokens may be learned, for example only those of answers; None for all. Learned are
            those that are also ``predicted``, so never the first of a piece.

    Attributes:
        num_blocks: blocks in all.
        num_tokens: real tokens in all.
        num_learned: learned tokens in all.
        block_size: tokens per block.
        fingerprint: identifies the texts and what is learned of them.

    Raises:
        CorpusError: there is no text, nothing of it is learned, or the block sizes differ.
    """

    def __init__(
        self, sources: Sequence[TokenBlocks], learned: Sequence[Bool[Tensor, "blocks seq"] | None] | None = None
    ) -> None:
        batches = [[*source.batches(_BLOCKS_AT_ONCE)] for source in sources]
        sizes = sorted({batch.input_ids.shape[1] for source in batches for batch in source})
        if not sizes:
            raise CorpusError("there is no text to train on: it has 0 blocks. Give more, or larger, documents.")
        if len(sizes) > 1:
            raise CorpusError(f"texts to train on are packed in blocks of {sizes} tokens. Pack them all alike.")
        (self.block_size,) = sizes
        flat = [batch for source in batches for batch in source]
        self._input_ids = torch.cat([batch.input_ids.to(torch.int32) for batch in flat])
        self._position_ids = torch.cat([batch.position_ids.to(torch.int32) for batch in flat])
        self._tokens = torch.cat([batch.valid.sum(-1) for batch in flat])
        self._learned = torch.cat([batch.predicted for batch in flat])
        masks = learned if learned is not None else [None] * len(sources)
        if any(mask is not None for mask in masks):
            self._learned = self._learned & torch.cat(
                [_mask(mask, source.num_blocks, self.block_size) for mask, source in zip(masks, sources, strict=True)]
            )
        self.num_blocks = len(self._input_ids)
        self.num_tokens = int(self._tokens.sum())
        self.num_learned = int(self._learned.sum())
        self.fingerprint = digest("training", [source.fingerprint for source in sources], [*map(_identity, masks)])
        if not self.num_learned:
            raise CorpusError(
                f"nothing can be learned from the text to train on: none of its {self.num_tokens:,} tokens counts. "
                "Give more text, or check what marks the answers."
            )

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self._input_ids[index].to(torch.int64),
            "position_ids": self._position_ids[index].to(torch.int64),
            "learned": self._learned[index],
            "index": torch.tensor(index),
            "num_tokens": self._tokens[index],
        }


def _mask(mask: Tensor | None, blocks: int, seq: int) -> Tensor:
    if mask is None:
        return torch.ones(blocks, seq, dtype=torch.bool)
    if mask.shape != (blocks, seq):
        raise CorpusError(
            f"what is learned has shape {tuple(mask.shape)}, and the text {(blocks, seq)}; they must fit."
        )
    return mask.cpu()


def _identity(mask: Tensor | None) -> str | None:
    return None if mask is None else hashlib.blake2b(mask.cpu().numpy().tobytes(), digest_size=12).hexdigest()


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return one batch of items, each entry stacked."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class EpochOrder(Sampler[int]):
    """Every block once, in an order that depends on the seed and the epoch alone; ``epoch`` is set from outside."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._num_blocks, self._seed = num_blocks, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed((self._seed * 2**20 + self.epoch) % 2**63)
        return iter(torch.randperm(self._num_blocks, generator=generator).tolist())
