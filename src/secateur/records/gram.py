"""Gram matrices of what the reading projections receive: sums of x xT over tokens, too large to keep all in memory.

A Gram matrix at the input of ``o_proj`` or ``down_proj`` is what least squares and every second-order score need. They
are additive like all statistics. They are handed over one site at a time, because those of a whole model may be far
larger than memory; where they lie (in memory, on disk) is the source's business.

Dims: ``channels`` inputs of one reading projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from secateur.records.units import SiteKey


@runtime_checkable
class Grams(Protocol):
    """The Gram matrices of one text, by site (layer, unit kind)."""

    @property
    def count(self) -> int:
        """Tokens behind the sums."""

    def load(self, site: SiteKey) -> Float[Tensor, "channels channels"]:
        """Return the sum of x xT over the tokens at a site, in float32 or wider; it may read a file."""


@dataclass(frozen=True, slots=True)
class GramsInMemory:
    """Gram matrices that are held in memory."""

    count: int
    sums: Mapping[SiteKey, Float[Tensor, "channels channels"]]

    def load(self, site: SiteKey) -> Float[Tensor, "channels channels"]:
        """Return the sum at a site."""
        return self.sums[site]


@dataclass(frozen=True, slots=True)
class BucketGrams:
    """The Gram matrices of one bucket of text, in memory.

    Attributes:
        calibration: of the text that is fitted to.
        validation: of other text, which judges the fit.
        documents: 63-bit hashes of the validation text's documents; evaluation excludes them.
    """

    calibration: GramsInMemory
    validation: GramsInMemory
    documents: Int64[Tensor, " documents"]


@dataclass(frozen=True, slots=True)
class MixedGrams:
    """A weighted mixture of texts, formed site by site when it is asked for.

    Attributes:
        parts: the texts' Gram matrices.
        weights: weight of each text's mean; they add up to 1.
    """

    parts: Sequence[Grams]
    weights: Sequence[float]

    @property
    def count(self) -> int:
        """Tokens behind the mixture: those of all parts."""
        return sum(part.count for part in self.parts)

    def load(self, site: SiteKey) -> Float[Tensor, "channels channels"]:
        """Return the mixture at a site, scaled to ``count`` tokens."""
        scaled = (
            part.load(site) * (weight * self.count / part.count)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )
        total = next(scaled)
        for matrix in scaled:
            total = total + matrix
        return total


@dataclass(frozen=True, slots=True)
class SummedGrams:
    """Two shards of one text together, added site by site when it is asked for."""

    first: Grams
    second: Grams

    @property
    def count(self) -> int:
        """Tokens behind the sum: those of both shards."""
        return self.first.count + self.second.count

    def load(self, site: SiteKey) -> Float[Tensor, "channels channels"]:
        """Return the sum at a site."""
        return self.first.load(site) + self.second.load(site)


def merge_grams(first: Grams, second: Grams) -> SummedGrams:
    """Return the Gram matrices of both shards together; they must come from the same model and sites."""
    return SummedGrams(first, second)


def effective_tokens(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Return how many equally weighted tokens say as much about a mean as a mixture of texts does.

    That is 1 / sum(share^2 / count): all tokens where the shares follow the counts, fewer the more they differ.

    Source: the effective sample size of Kish 1965, Survey Sampling.

    Args:
        counts: tokens of each text, above 0.
        shares: weight of each text's mean; they add up to 1.
    """
    return 1.0 / sum(share**2 / count for count, share in zip(counts, shares, strict=True))
