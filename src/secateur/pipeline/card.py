"""What a run tells the model card: its text and its origin, without a path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from secateur.corpus import source_signature
from secateur.export.licences import Terms, licence_terms
from secateur.export.model_card import Corpus, Origin, read_front_matter
from secateur.recipe import Recipe
from secateur.records.statistics import BucketStatistics
from secateur.store.checkpoints import Checkpoint

_SHOWN = {"calibrate", "prune", "recover"}
"""Sections of the recipe that the card shows; the others say where things lie."""


def hub_id_of(spec: str) -> str:
    """Return what a recipe names as model if that is a hub id; "" for a folder or file."""
    return "" if Path(spec).expanduser().exists() else spec


def describe_corpora(recipe: Recipe, statistics: Mapping[str, BucketStatistics]) -> list[Corpus]:
    """Return every bucket of a recipe by name, size and fingerprint."""
    corpora = []
    for name, spec in recipe.buckets().items():
        read = statistics.get(name)
        corpora.append(
            Corpus(
                name,
                dataset=spec.dataset or "",
                config=spec.config or "",
                size_bytes=sum(size for _, size, _ in source_signature(spec)),
                calibration_tokens=read.num_tokens if read is not None else 0,
                fingerprint=read.corpus_fingerprint if read is not None else "",
            )
        )
    return corpora


def describe_origin(
    recipe: Recipe, checkpoint: Checkpoint, model_fingerprint: str, versions: Mapping[str, str]
) -> Origin:
    """Return how a run's model is made."""
    return Origin(
        hub_id=hub_id_of(recipe.model),
        model_type=str(checkpoint.config.get("model_type", "")),
        model_fingerprint=model_fingerprint,
        versions=versions,
        recipe=recipe.model_dump(mode="json", include=_SHOWN, exclude_defaults=True),
    )


def terms_of(checkpoint: Checkpoint) -> Terms:
    """Return what the dense model's licence asks of whoever shares a pruned copy."""
    return licence_terms(
        read_front_matter(checkpoint.folder),
        base_model=checkpoint.name,
        model_type=str(checkpoint.config.get("model_type", "")),
    )
