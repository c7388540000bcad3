"""Cus-Prun as its paper has it, for comparison: rows and columns of single matrices become zero, and nothing smaller.

``method: cus_prun`` cuts whole units, so that a smaller model comes out. The paper zeroes neurons: single rows and
columns (gate, up and down; queries, keys, values and output), each matrix by itself. This does the latter, so that both
readings can be measured side by side. It is no way to make a model: the copy it returns is as large and as slow as the
model was.

Source: Zhao et al. 2025, Cus-Prun, arXiv 2506.02561. A neuron is irrelevant to a dimension (the texts of one language,
domain or task) if its impact is small on every document of it; what is irrelevant to all dimensions is zeroed. What the
paper leaves open is decided as in ``score.cus_prun``: small means among the lowest p of its kind in its layer, and p is
such that the intersection is the share asked for. Here that share is reached in every matrix, by ``calibrate.neurons``'
impacts. The intersection at p are those whose largest rank over documents and dimensions is p or less, so the lowest of
these maxima are taken.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.calibrate.neurons import Matrix, collect_neuron_impacts, matrices
from secateur.corpus import load_split
from secateur.errors import ConfigError
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import family_of
from secateur.progress import Progress, silent
from secateur.recipe import CorpusSpec
from secateur.records.impacts import ImpactStatistics
from secateur.records.units import SiteKey

Text = str | Path | CorpusSpec | Sequence[str]
Relevance = Literal["rank", "mean_rank"]


@dataclass(frozen=True, slots=True)
class Zeroed:
    """A model with neurons at zero.

    Attributes:
        model: a copy of the model, of the same shapes.
        neurons: rows or columns that are zero now, ascending, by name of the weight and "rows" or "columns".
        num_zeroed: weights that are zero now; ``num_weights`` of all weights of these matrices.
        num_weights: see ``num_zeroed``.
    """

    model: Any
    neurons: Mapping[tuple[str, str], tuple[int, ...]]
    num_zeroed: int
    num_weights: int


def cus_prun_published(
    model: Any,
    tokenizer: Any,
    texts: Text | Mapping[str, Text],
    *,
    ratio: float = 0.25,
    relevance: Relevance = "rank",
    max_tokens: int | None = 4096,
    block_size: int = 512,
    progress: Progress = silent,
) -> Zeroed:
    """Return a copy of a model with the neurons at zero that no dimension needs; it is not smaller.

    Takes some twenty times as long as a plain pass over the text, more with longer blocks.

    Args:
        model: a loaded transformers causal language model; it stays as it is.
        tokenizer: its fast tokenizer.
        texts: of one dimension, or of several by name; their calibration split is used.
        ratio: share of the neurons of every matrix, above 0 and below 1.
        relevance: of a neuron to a dimension. ``rank``: its largest rank over the documents, as published;
            ``mean_rank``: the mean.
        max_tokens: of every text; None for all.
        block_size: tokens per block; longer documents are cut.
        progress: told about finished tokens.

    Raises:
        ConfigError: no text, a ratio out of range, or one that rounds to no neuron.
        CorpusError: unreadable or too little text.
        FamilyError: the model type is not supported, its queries, keys and values are not rows of their own, or there
            are experts.
        CheckpointError: activations are not finite.
    """
    geometry = build_geometry(family_of(model.config.model_type), model.config.to_dict())
    geometry.require_positions(block_size)
    found = matrices(geometry)
    _require_ratio(ratio, found)
    named = dict(texts) if isinstance(texts, Mapping) else {"text": texts}
    if not named:
        raise ConfigError("texts is empty, and neurons are judged by text. Give one text, or several by name.")
    impacts = []
    for name, text in named.items():
        source = CorpusSpec(path=str(text)) if isinstance(text, str | Path) else text
        blocks = load_split(source, "calibration", tokenizer, max_tokens=max_tokens, block_size=block_size, name=name)
        label = f"impact of neurons on {name}"
        impacts.append(collect_neuron_impacts(model, blocks, geometry, progress=progress, label=label))
    return with_zeros(model, geometry, irrelevant(impacts, ratio, relevance))


def irrelevant(
    dimensions: Sequence[ImpactStatistics], ratio: float, relevance: Relevance = "rank"
) -> dict[SiteKey, tuple[int, ...]]:
    """Return by site the neurons that are irrelevant to all dimensions, ascending: the share ``ratio`` of each site.

    Args:
        dimensions: what the documents of each say.
        ratio: share of a site's neurons.
        relevance: as in ``cus_prun_published``.
    """
    chosen = {}
    for site in dimensions[0].units:
        said = [dimension.units[site] for dimension in dimensions]
        ranks = [each.rank_max if relevance == "rank" else each.rank_sum / each.count for each in said]
        chosen[site] = _lowest(torch.stack(ranks).amax(0), ratio)
    return chosen


def _lowest(scores: Float64[Tensor, " neurons"], ratio: float) -> tuple[int, ...]:
    """Return the places of the lowest scores; of equal ones the later, because plans keep the earlier."""
    latest_first = torch.argsort(scores.flip(0), stable=True)
    gone = len(scores) - 1 - latest_first[: round(ratio * len(scores))]
    return tuple(sorted(gone.tolist()))


def _require_ratio(ratio: float, found: Sequence[Matrix]) -> None:
    if not 0 < ratio < 1:
        raise ConfigError(f"ratio is {ratio}; it is the share of neurons that become zero, above 0 and below 1.")
    fewest = min(matrix.neurons for matrix in found)
    if round(ratio * fewest) == 0:
        raise ConfigError(
            f"ratio {ratio} of the {fewest} neurons of the smallest matrix rounds to none. Raise it to "
            f"{1 / fewest:.3g} or more."
        )


def with_zeros(model: Any, geometry: Geometry, chosen: Mapping[SiteKey, Sequence[int]]) -> Zeroed:
    """Return a copy of a model with neurons at zero, of every matrix of a site the same ones.

    Args:
        model: it stays as it is.
        geometry: of the model.
        chosen: neurons by site, as ``irrelevant`` returns them.
    """
    made, layout = copy.deepcopy(model), geometry.family.weight_layout
    neurons: dict[tuple[str, str], tuple[int, ...]] = {}
    num_zeroed = num_weights = 0
    with torch.no_grad():
        for matrix in matrices(geometry):
            module = made.get_submodule(matrix.segment.module)
            places = torch.tensor(chosen[matrix.site], device=module.weight.device) + matrix.segment.offset
            writes = matrix.segment.side == "out"
            weight = module.weight if writes == (layout == "out_in") else module.weight.T
            weight[places] = 0.0
            if writes and getattr(module, "bias", None) is not None:
                module.bias[places] = 0.0
            key = f"{matrix.segment.module}.weight", "rows" if writes else "columns"
            neurons[key] = (*neurons.get(key, ()), *places.tolist())
            num_zeroed += len(places) * weight.shape[1]
            num_weights += matrix.neurons * weight.shape[1]
    return Zeroed(made, neurons, num_zeroed, num_weights)
