"""Scores that look at several texts: what each dimension needs, and the domain against general text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate import collect, collect_gradients
from secateur.calibrate import gradients as gradient_pass
from secateur.errors import ConfigError
from secateur.families.loader import families
from secateur.records.gradients import GradientStatistics, UnitGradients
from secateur.records.impacts import UnitImpacts, judged
from secateur.records.plan import LayerPlan, Plan
from secateur.score import Evidence, Outcome, TextRecords, notes_on, score_units
from secateur.score.contrast import contrast
from secateur.score.cus_prun import cus_prun
from secateur.score.d_pruner import d_pruner
from secateur.score.gaprune import gaprune
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.score.evidence import evidence

DIMENSIONS = {"language": ["zh"], "domain": ["law", "courts"], "task": ["qa"]}
SHARES = (0.1, 0.3, 0.5, 0.8, 1.0)


def drawn(*shape: int, seed: int) -> Tensor:
    """Return positive random numbers."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


IMPACTS = {name: drawn(4, 20, seed=i) * drawn(20, seed=9) for i, name in enumerate(["zh", "law", "courts", "qa"])}


def of_documents(impacts: UnitImpacts) -> Evidence:
    """Return the evidence of documents."""
    return evidence(torch.ones(1, 20), load_impacts=lambda: impacts)


def several_texts() -> Evidence:
    """Return the evidence of four buckets, and of each alone."""
    alone = {name: of_documents(judged(values)) for name, values in IMPACTS.items()}
    together = of_documents(judged(torch.cat(list(IMPACTS.values()))))
    return replace(together, of_bucket=alone.__getitem__, buckets=tuple(IMPACTS))


def lowest(impacts: Tensor, share: float) -> Tensor:
    """Return which units are among the lowest share of the layer on every document, by counting."""
    less = (impacts[:, :, None] > impacts[:, None, :]).sum(2) + 1
    return (less <= share * impacts.shape[1]).all(0)


@pytest.mark.parametrize("share", SHARES)
def test_a_threshold_on_the_score_is_the_intersection_of_the_irrelevant_sets(share: float) -> None:
    """Units among the lowest share on every document of every dimension, and no others, score at most that share."""
    expected = torch.stack([lowest(values, share) for values in IMPACTS.values()]).all(0)
    assert torch.equal(cus_prun(several_texts(), dimensions=DIMENSIONS) <= share, expected)


@pytest.mark.parametrize("epsilon", (0.05, 0.2, 0.5))
def test_so_is_one_on_the_impact(epsilon: float) -> None:
    """The published rule: below epsilon on every document of every dimension."""
    expected = (torch.cat(list(IMPACTS.values())) <= epsilon).all(0)
    score = cus_prun(several_texts(), dimensions=DIMENSIONS, relevance="impact")
    assert torch.equal(score <= epsilon, expected)


@pytest.mark.parametrize("relevance", ["rank", "high_rank", "mean_rank"])
@pytest.mark.parametrize("share", SHARES)
def test_thresholds_per_dimension_mark_the_same_share_of_each(relevance: Any, share: float) -> None:
    """The share least relevant to each dimension, intersected."""
    expected = []
    for names in DIMENSIONS.values():
        impacts = judged(torch.cat([IMPACTS[name] for name in names]))
        options: dict[str, Any] = {"relevance": relevance}
        expected.append(lowest(cus_prun(of_documents(impacts), **options)[None], share))
    score = cus_prun(several_texts(), dimensions=DIMENSIONS, thresholds="per_dimension", **options)
    assert torch.equal(score <= share, torch.stack(expected).all(0))


def test_with_one_threshold_for_all_dimensions_are_one_pooled_text() -> None:
    """Which the docstring warns of; with thresholds of their own they are not."""
    pooled = cus_prun(several_texts())
    assert torch.equal(cus_prun(several_texts(), dimensions=DIMENSIONS), pooled)
    by_dimension = cus_prun(several_texts(), dimensions=DIMENSIONS, thresholds="per_dimension")
    assert not torch.equal(by_dimension.argsort(), pooled.argsort())


def test_dimensions_need_text_and_every_bucket_a_dimension() -> None:
    """Said by name."""
    with pytest.raises(ConfigError, match=r"no text for task\. Name one or more"):
        cus_prun(several_texts(), dimensions={**DIMENSIONS, "task": []})
    with pytest.raises(ConfigError, match="leaves out courts, qa, whose text decides"):
        cus_prun(several_texts(), dimensions={"language": ["zh"], "domain": ["law"]})


def outcome(keep: tuple[int, ...], scores: list[float], **options: Any) -> Outcome:
    """Return what became of the scores of one layer."""
    layer = LayerPlan(num_units=len(scores), keep=keep)
    plan = Plan("llama", "", "uniform", "cus_prun", {}, {}, {"ffn_channel": (layer,)}, {}, {})
    fingerprints = {"zh": "a", "law": "b", "qa": "a"}
    return Outcome(options, {"ffn_channel": [torch.tensor(scores).double()]}, plan, fingerprints)


def test_a_plan_says_how_far_the_irrelevant_units_reach() -> None:
    """And which share of the cut the ranking filled."""
    scores = [0.25, 0.4, 0.75, 0.9]
    (within,) = notes_on("cus_prun", outcome((1, 2, 3), scores))
    assert within == (
        "50.0% of the FFN channels are among the lowest 50% of their layer for every dimension; the cut takes 25.0% of "
        "them, and reaches up to the lowest 25.0%"
    )
    (beyond,) = notes_on("cus_prun", outcome((3,), scores, irrelevant=0.3))
    assert "25.0% of the FFN channels are among the lowest 30%" in beyond
    assert "reaches up to the lowest 75.0%. The 50.0% that these do not fill were chosen by rank alone" in beyond
    assert notes_on("cus_prun", outcome((1, 2, 3), scores, relevance="impact")) == []
    assert notes_on("contextual", outcome((1, 2, 3), scores)) == []


def test_the_same_text_in_two_dimensions_is_said() -> None:
    """By the fingerprint of the text, or by the name of the bucket."""
    dimensions = {"language": ["zh"], "domain": ["law"], "task": ["qa", "law"]}
    first, second, _ = notes_on("cus_prun", outcome((1, 2, 3), [0.1] * 4, dimensions=dimensions))
    assert first.startswith("dimensions language and task hold the same text (zh and qa)")
    assert second.startswith("dimensions domain and task hold the same text (law and law)")


# -- domain against general text -------------------------------------------------------------------------------------


def gradients(seed: int, scale: float = 1.0) -> UnitGradients:
    """Return made-up gradient sums of five units, as if the loss had been multiplied by ``scale``."""
    slopes, nothing = (drawn(6, 5, seed=seed) - 0.5) * scale, torch.zeros(5).double()
    sketch = (drawn(5, 8, seed=seed + 50) - 0.5) * scale
    return UnitGradients(6, slopes.square().sum(0), nothing, nothing, nothing, slopes.abs().sum(0), sketch=sketch)


def two_texts(scale: float = 1.0) -> Evidence:
    """Return the evidence of a domain, and of general text."""
    reader, weights = drawn(3, 5, seed=5) - 0.5, drawn(5, 4, seed=6) - 0.5
    loaders: dict[str, Any] = {"load_reader": lambda: reader, "load_weights": lambda: [weights]}
    general = evidence(drawn(30, 5, seed=2), load_gradients=lambda: gradients(3, scale), **loaders)
    domain = evidence(drawn(30, 5, seed=1), load_gradients=lambda: gradients(4, scale), **loaders)
    return replace(domain, of_bucket={"general": general}.__getitem__, buckets=("law",))


def test_d_pruner_is_its_formula() -> None:
    """Block by block, with the regularised gradient."""
    found, item = gradients(4), two_texts()
    slopes = (drawn(6, 5, seed=4) - 0.5) / (found.mask_sq / 6).mean().sqrt()
    tokens, reader = drawn(30, 5, seed=2), drawn(3, 5, seed=5) - 0.5
    generality = tokens.square().mean(0) * reader.square().sum(0)
    fisher = slopes.square().mean(0)
    regularised = slopes * (1 + 2 * 0.7 * fisher * generality / generality.mean())
    expected = (regularised.abs() + regularised.square() / 2).mean(0)
    torch.testing.assert_close(d_pruner(item, generality=0.7), expected)
    assert not torch.equal(d_pruner(item, generality=0.7), d_pruner(item, generality=0.0))


@pytest.mark.parametrize("method", [d_pruner, gaprune])
def test_the_scale_of_the_loss_does_not_matter(method: Any) -> None:
    """Gradients that carry the loss scale of half precision give the same scores."""
    torch.testing.assert_close(method(two_texts(65_536.0)), method(two_texts()), rtol=1e-12, atol=0)


def test_nor_does_it_in_the_pass_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is multiplied before the backward pass gives the same D-Pruner and GAPrune scores of every unit."""
    model = pico_model(families()["llama"])
    geometry = geometry_of(model, families()["llama"])

    def scored() -> list[Tensor]:
        texts = []
        for seed in (0, 1):
            blocks = hand_made_blocks(seed=seed)
            slopes: GradientStatistics = collect_gradients(model, blocks, geometry, ["ffn_channel"], sketch=True)
            texts.append(TextRecords(collect(model, blocks, geometry), gradients=slopes))
        return [
            score_units(
                method,
                texts[0].statistics,
                geometry,
                ["ffn_channel"],
                load_tensor=model.state_dict().get,
                gradients=texts[0].gradients,
                by_bucket={"general": texts[1]},
            ).values["ffn_channel"][1]
            for method in ("d_pruner", "gaprune")
        ]

    plain = scored()
    unscaled = gradient_pass.block_loss
    monkeypatch.setattr(gradient_pass, "block_loss", lambda *args: unscaled(*args) * 65_536)
    for first, second in zip(plain, scored(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_gaprune_is_its_formula() -> None:
    """Every term over its mean in the layer; without general text, size and alignment it is Fisher times size."""
    here, there, item = gradients(4), gradients(3), two_texts()
    size = (drawn(5, 4, seed=6) - 0.5).norm(dim=1)
    size = size / size.mean()
    needed, elsewhere = (found.mask_sq / found.mask_sq.mean() for found in (here, there))
    assert here.sketch is not None and there.sketch is not None
    alike = (here.sketch * there.sketch).sum(1) / here.sketch.norm(dim=1) / there.sketch.norm(dim=1)
    expected = ((needed - 0.6 * elsewhere) * size + 0.4 * size.sqrt()) * (1 + 0.3 * alike)
    torch.testing.assert_close(gaprune(item, alpha=0.3, beta=0.6, gamma=0.4), expected)
    torch.testing.assert_close(gaprune(item, alpha=0.0, beta=0.0, gamma=0.0), needed * size)
    plain = replace(here, sketch=None)
    with pytest.raises(ConfigError, match="no projections"):
        gaprune(replace(item, load_gradients=lambda: plain))


def test_contrast_sets_a_score_against_itself_on_other_text() -> None:
    """Difference and ratio of scores over their means, difference of ranks; nothing of the other text at strength 0."""
    item = two_texts()
    here, there = (drawn(30, 5, seed=seed).square().mean(0).sqrt() for seed in (1, 2))
    mine, other = here / here.mean(), there / there.mean()
    torch.testing.assert_close(contrast(item), mine - other)
    torch.testing.assert_close(contrast(item, strength=0.5), mine - 0.5 * other)
    torch.testing.assert_close(contrast(item, by="ratio"), (mine + 1e-3) / (other + 1e-3))
    ranks = (here.argsort().argsort() - there.argsort().argsort()) / 5
    torch.testing.assert_close(contrast(item, by="rank"), ranks.double())
    assert torch.equal(contrast(item, strength=0.0).argsort(), here.argsort())


def test_contrast_refuses_what_says_nothing() -> None:
    """Itself, a text against itself, ratios of scores below 0, methods of other units."""
    item = two_texts()
    for options, text, message in (
        ({"of": "contrast"}, item, "names contrast itself"),
        ({}, replace(item, buckets=("general",)), "bucket 'general' against itself"),
        ({"of": "reversed", "by": "ratio"}, item, "reversed gave some for the ffn_channels of layer 0"),
        ({"of": "block_influence"}, item, "cannot score units of kind ffn_channel"),
    ):
        with pytest.raises(ConfigError, match=message):
            contrast(text, **options)
