"""Weights of texts in the fits on the pruned stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.corpus import PackedBlocks, load_split
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import family_of
from secateur.pipeline.streams import fit_on_pruned_stream
from secateur.records.plan import Plan
from secateur.stream.sources import LoadedLayers
from tests.pico import general_paragraphs, medical_records, pico_tokenizer, random_model

SIZES = {"calibration": (1024, 512), "validation": (256, 128)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The pico tokenizer."""
    return pico_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A model in float64, where sums can be compared closely."""
    return random_model(len(tokenizer), dtype=torch.float64)


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> dict[str, list[PackedBlocks]]:
    """Two texts of different lengths, by split."""
    sources = [[str(record) for record in medical_records(300)], general_paragraphs(300)]
    return {
        split: [
            load_split(source, split, tokenizer, block_size=64, max_tokens=size)  # type: ignore[arg-type]
            for source, size in zip(sources, sizes, strict=True)
        ]
        for split, sizes in SIZES.items()
    }


@pytest.fixture(scope="module")
def plan(model: Any, tokenizer: Any) -> Plan:
    """Half of the channels go."""
    statistics = secateur.calibrate(model, tokenizer, general_paragraphs(300), max_tokens=512, block_size=64)
    return secateur.plan(model, statistics, budget={"channels": 0.5})


def weights(
    model: Any, plan: Plan, texts: Mapping[str, Sequence[PackedBlocks]], shares: Sequence[float] | None, count: int = 2
) -> list[Tensor]:
    """Return the fitted weights of the first ``count`` texts."""
    config = model.config.to_dict()
    geometry: Geometry = build_geometry(family_of(model.config.model_type), config)
    fitted, held_out = (texts[split][:count] for split in ("calibration", "validation"))
    result = fit_on_pruned_stream(
        LoadedLayers(model, geometry), plan, fitted, held_out, batch_size=4, shares=None if shares is None else shares
    )
    return list(result.weights.values())


def test_the_limit_of_a_weight_is_the_text_alone(
    model: Any, plan: Plan, texts: Mapping[str, Sequence[PackedBlocks]]
) -> None:
    """A text that hardly counts hardly changes a fit; equal texts with any weights are one text."""
    alone = weights(model, plan, texts, None, count=1)
    nearly, even = (weights(model, plan, texts, shares) for shares in ([1 - 1e-9, 1e-9], [0.5, 0.5]))
    for first, second, third in zip(alone, nearly, even, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(first, third, rtol=1e-3)


def test_weights_by_length_count_every_token_the_same(
    model: Any, plan: Plan, texts: Mapping[str, Sequence[PackedBlocks]]
) -> None:
    """The default is the mixture in which no token is special, where both splits have the same proportions."""
    sizes = [text.num_tokens for text in texts["calibration"]]
    assert [text.num_tokens for text in texts["validation"]] == [size // 4 for size in sizes]
    by_length = weights(model, plan, texts, [size / sum(sizes) for size in sizes])
    for first, second in zip(weights(model, plan, texts, None), by_length, strict=True):
        torch.testing.assert_close(first, second)
