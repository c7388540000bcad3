"""Sums over tokens that do not care how the tokens were batched: pure tensor maths, no hooks, no models.

Each update reduces in float32 (float64 for float64 inputs) and is added to float64 totals; Gram matrices, which are
large, are also totalled in that dtype.

Dims: ``tokens`` real tokens of one batch, ``channels`` values per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from secateur.calibrate.precision import exact_float32
from secateur.records.statistics import Moments, SequenceSums


def widened(values: Tensor) -> Tensor:
    """Return values in the dtype to sum in: float32 for half precision, else their own."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


_CACHED_VALUES = 3 * 2**16
"""How many float32 values a processor's second-level cache holds twice, once as they are and once in the scratch."""


def _cached_rows(values: Float[Tensor, "tokens channels"]) -> Sequence[Float[Tensor, "some channels"]]:
    """Return the rows in runs that stay in a processor's cache while they are summed; on other devices all at once.

    Written to memory and read back, products and absolute values cost twice as much as their sums.
    """
    if values.device.type != "cpu":
        return (values,)
    return torch.split(values, max(1, _CACHED_VALUES // values.shape[1]))


class Scratch:
    """One reusable buffer per width; a fresh one for every sum would cost as much in page faults as the sum itself."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def like(self, values: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Return an uninitialised tensor of the shape, dtype and device of ``values``."""
        key = (values.shape[1], values.dtype, values.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < values.shape[0]:
            buffer = self._buffers[key] = torch.empty_like(values, memory_format=torch.contiguous_format)
        return buffer[: values.shape[0]]


def sum_abs(values: Float[Tensor, "tokens channels"], scratch: Scratch) -> Float64[Tensor, " channels"]:
    """Return the sum over tokens of |x|."""
    parts = [torch.abs(rows, out=scratch.like(rows)).sum(0).double() for rows in _cached_rows(widened(values))]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def cosine_sums(
    streams: Sequence[Float[Tensor, "tokens hidden"]],
    pairs: Mapping[str, tuple[int, int]],
    scratch: Scratch,
    epsilon: float = 1e-8,
) -> dict[str, Float64[Tensor, ""]]:
    """Return the sum over tokens of the cosine of named pairs of streams; lengths are taken once per stream.

    Args:
        streams: vectors of the same tokens at several places.
        pairs: name -> indices of two streams.
        scratch: for products.
        epsilon: vectors shorter than this count as that long.
    """
    wide = [widened(values) for values in streams]
    lengths = [torch.linalg.vector_norm(values, dim=-1).clamp_min(epsilon) for values in wide]
    sums = {}
    for name, (first, second) in pairs.items():
        products = torch.mul(wide[first], wide[second], out=scratch.like(wide[first])).sum(-1)
        sums[name] = products.div_(lengths[first] * lengths[second]).sum().double()
    return sums


def _moments(values: Float[Tensor, "tokens channels"], scratch: Scratch) -> Moments:
    magnitudes = torch.abs(values, out=scratch.like(values))
    return Moments(
        count=values.shape[0],
        sum=values.sum(0).double(),
        sum_abs=magnitudes.sum(0).double(),
        sum_sq=magnitudes.mul_(magnitudes).sum(0).double(),
    )


class MomentSums:
    """Running sums of x, |x| and x^2 per channel, and of each sequence's squared mean |x|."""

    def __init__(self) -> None:
        self._total: Moments | None = None
        self._sequences: SequenceSums | None = None

    def update(self, values: Float[Tensor, "tokens channels"], scratch: Scratch) -> None:
        """Add the real tokens of one sequence; one without any adds nothing."""
        batch = reduce(add, (_moments(rows, scratch) for rows in _cached_rows(widened(values))))
        self._total = batch if self._total is None else self._total + batch
        mean = batch.sum_abs / max(batch.count, 1)
        sequence = SequenceSums(count=min(batch.count, 1), mean_abs_sq=mean.square_())
        self._sequences = sequence if self._sequences is None else self._sequences + sequence

    def result(self) -> Moments:
        """Return the sums over tokens so far, on the CPU."""
        assert self._total is not None, "nothing was collected"
        total = self._total
        return Moments(total.count, total.sum.cpu(), total.sum_abs.cpu(), total.sum_sq.cpu())

    def sequences(self) -> SequenceSums:
        """Return the sums over sequences so far, on the CPU."""
        assert self._sequences is not None, "nothing was collected"
        return SequenceSums(self._sequences.count, self._sequences.mean_abs_sq.cpu())

    def is_finite(self) -> bool:
        """Return whether every sum is finite."""
        return self._total is None or bool(torch.isfinite(self._total.sum_sq).all())


_NUM_PANELS = 8
_PANEL_STEP = 32


class GramSum:
    """Running sum of x xT, in float32 (float64 for float64 inputs), on the device of the values.

    Only the upper triangle is summed, in panels of rows that reach from the diagonal to the last column: with eight
    panels that is 9/16 of the work and of the memory.
    """

    def __init__(self) -> None:
        self._panels: list[Tensor] = []

    def update(self, values: Float[Tensor, "tokens channels"]) -> None:
        """Add real tokens; many at a time are cheaper than few."""
        values = widened(values)
        if not self._panels:
            self._panels = _empty_panels(values)
        with exact_float32():
            for panel in self._panels:
                start = values.shape[1] - panel.shape[1]
                panel.addmm_(values[:, start : start + panel.shape[0]].T, values[:, start:])

    def result(self) -> Float[Tensor, "channels channels"]:
        """Return the whole symmetric matrix so far, on the CPU."""
        assert self._panels, "nothing was collected"
        channels = self._panels[0].shape[1]
        full = torch.empty(channels, channels, dtype=self._panels[0].dtype)
        for panel in self._panels:
            start, stop = channels - panel.shape[1], channels - panel.shape[1] + panel.shape[0]
            full[start:stop, start:] = panel
            full[stop:, start:stop] = full[start:stop, stop:].T
            square = full[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
        return full

    def is_finite(self) -> bool:
        """Return whether every sum is finite; a channel whose own square sum is finite has only finite products."""
        return not self._panels or bool(torch.isfinite(torch.cat([panel.diagonal() for panel in self._panels])).all())


def _empty_panels(values: Tensor) -> list[Tensor]:
    channels = values.shape[1]
    height = _PANEL_STEP * -(-channels // (_NUM_PANELS * _PANEL_STEP))
    starts = range(0, channels, height)
    return [values.new_zeros(min(height, channels - start), channels - start) for start in starts]


def count_tokens(token_ids: Int64[Tensor, " tokens"], vocab_size: int) -> Int64[Tensor, " vocab"]:
    """Return how often each token id occurs."""
    return torch.bincount(token_ids, minlength=vocab_size)
