"""Mixing Gram matrices, refitting on mixtures, and saying when there is too little text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import CorpusError
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import family_of
from secateur.pipeline.grams import Reconstructor, Supply, judging_tokens, together
from secateur.records.gram import GramsInMemory
from secateur.shrink.reconstruct import choose_reconstruction, reconstruct
from tests.pico import random_model

SITE = (0, "ffn_channel")


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    """Of a llama with 96 FFN channels and 64 input channels of o_proj."""
    config = random_model().config.to_dict()
    return build_geometry(family_of("llama"), config)


def rows(tokens: int, seed: int, like: int = 0, channels: int = 96) -> Tensor:
    """Return activations that are correlated as in all texts ``like`` this one."""
    generator, kind = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(100 + like)
    basis = torch.randn(16, channels, dtype=torch.float64, generator=kind)
    noise = torch.randn(tokens, channels, dtype=torch.float64, generator=generator)
    return torch.randn(tokens, 16, dtype=torch.float64, generator=generator) @ basis + noise


def of(x: Tensor) -> GramsInMemory:
    """Return the Gram matrix of activations."""
    return GramsInMemory(x.shape[0], {SITE: x.T @ x})


def test_without_weights_every_token_counts_the_same() -> None:
    """Texts together are the sums of all their tokens; one text is itself."""
    a, b = rows(200, 0), rows(700, 1)
    torch.testing.assert_close(together({"a": of(a), "b": of(b)}).load(SITE), of(torch.cat([a, b])).load(SITE))
    alone = of(a)
    assert together({"a": alone}) is alone
    assert together({"a": alone, "b": of(b)}, {"a": 3.0}) is alone


def test_fits_judging_and_refits_follow_the_weights(geometry: Geometry) -> None:
    """With a mixture, the chosen weight is that of texts in which every token of a bucket is weighed alike."""
    mix = {"a": 0.8, "b": 0.2}
    fitted = {"a": rows(300, 0), "b": rows(900, 1, like=1)}
    judging = {"a": rows(80, 2), "b": rows(240, 3, like=1)}
    weight = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    keep = list(range(0, 96, 2))
    reconstructor = Reconstructor(*(together({n: of(x) for n, x in part.items()}, mix) for part in (fitted, judging)))
    found = reconstructor(geometry.axes["ffn_channel"][0], keep, weight)

    weighted = [sum(mix[n] * x.T @ x / len(x) for n, x in part.items()) for part in (fitted, judging)]
    fit, judge = (matrix for matrix in weighted if isinstance(matrix, Tensor))
    chosen = choose_reconstruction(weight, fit, judge, torch.tensor(keep))
    assert chosen.ridge is not None
    both = (1200 * fit + 320 * judge) / 1520
    torch.testing.assert_close(found, reconstruct(weight, both, torch.tensor(keep), ridge=chosen.ridge))
    report = reconstructor.reports[0]
    assert (report.ridge, report.error_after) == (chosen.ridge, pytest.approx(chosen.error_after))


def test_too_little_text_is_said_with_how_much_would_do(geometry: Geometry) -> None:
    """Per kind, with tokens, channels and the aim; nothing is said where there is enough."""
    kinds = ["ffn_channel", "gqa_group"]
    assert Supply.of(geometry, kinds, {"a": 480}).notes() == []
    assert Supply.of(geometry, kinds, {"a": 300, "b": 180}).notes() == []
    assert Supply.of(geometry, kinds, {"a": 400}).notes() == [
        "the projection that reads FFN channels has 4.1 calibration tokens per channel (400 tokens for 96 channels); "
        "least squares and methods that read Gram matrices want 10. Calibrate on 960 tokens or more "
        "(calibrate.max_tokens, and as much text)"
    ]
    assert [note[:38] for note in Supply.of(geometry, kinds, {"a": 200}).notes()] == [
        "the projection that reads FFN channels",
        "the projection that reads GQA groups h",
    ]


def test_a_lopsided_mixture_counts_for_what_it_says(geometry: Geometry) -> None:
    """Nine tenths of the weight on a short text cannot be made up for by a long one."""
    tokens, kinds = {"a": 300, "b": 9000}, ["ffn_channel"]
    assert Supply.of(geometry, kinds, tokens).notes() == []
    (note,) = Supply.of(geometry, kinds, tokens, {"a": 9.0, "b": 1.0}).notes()
    assert "3.8 calibration tokens per channel (370 tokens, as the mixture weighs them, for 96 channels)" in note
    assert "(300 tokens for 96" in Supply.of(geometry, kinds, tokens, {"a": 9.0}).notes()[0]


def test_fewer_tokens_than_channels_are_refused(geometry: Geometry) -> None:
    """At one token per channel a Gram matrix can just have full rank; below it never has."""
    Supply.of(geometry, ["ffn_channel"], {"a": 96}).require()
    with pytest.raises(
        CorpusError, match=r"has 0\.9 calibration tokens per channel \(95 tokens for 96 channels\), and Gr"
    ):
        Supply.of(geometry, ["ffn_channel"], {"a": 95}).require()
    Supply.of(geometry, [], {"a": 1}).require()


def test_a_quarter_as_much_text_judges() -> None:
    """At least a block; all of it where calibration has no limit."""
    assert [judging_tokens(n, 512) for n in (65_536, 1024, None)] == [16_384, 512, None]
