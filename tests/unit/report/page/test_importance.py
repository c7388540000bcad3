"""Importance in bins, and parameters of single layers from the plan's totals."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.records.plan import LayerPlan
from secateur.report.page.importance import bin_importance, parameters_by_layer

from ..records import plan


def test_bins_hold_every_unit_once_with_its_score_and_its_fate() -> None:
    """Means over bins, weighed by their units, are the means over units; ranks run from 0 to 1."""
    generator = np.random.default_rng(0)
    scores = [generator.normal(size=103), generator.normal(size=17) + 1]
    layers = [LayerPlan(103, tuple(range(0, 103, 2))), LayerPlan(17, tuple(range(5)))]
    bins = bin_importance(scores, layers, max_bins=20)
    everything = np.concatenate(scores)
    for index, (values, layer) in enumerate(zip(scores, layers, strict=True)):
        mine = [one for one in bins if one.layer == index]
        assert len(mine) == min(20, len(values))
        assert sum(one.num_units for one in mine) == len(values)
        assert sum(one.num_units * one.score for one in mine) == pytest.approx(values.sum())
        assert sum(one.num_units * one.kept_ratio for one in mine) == pytest.approx(len(layer.keep))
        assert [one.start for one in mine] == pytest.approx([0, *(one.end for one in mine[:-1])])
        assert mine[-1].end == 1
        percentiles = [100 * np.mean(everything <= value) for value in values]
        assert np.average([b.percentile for b in mine], weights=[b.num_units for b in mine]) == pytest.approx(
            np.mean(percentiles)
        )
    assert bins[0].score > bins[1].score


def test_scores_of_other_units_are_refused() -> None:
    """Scores that are not of the plan's units must not be shown as theirs."""
    with pytest.raises(ValueError, match="different units"):
        bin_importance([np.ones(3)], [LayerPlan(4, (0,))])


@pytest.mark.parametrize("kept", [(3, 5, 8), (8, 8, 2), (4, 0, 4), (8, 8, 8)])
def test_parameters_by_layer_are_those_of_the_units_and_of_what_stands_beside_them(kept: tuple[int, ...]) -> None:
    """A cost per unit and one per sub-layer are found from totals, also where a whole sub-layer goes."""
    unit, fixed = 30, 7
    layers = tuple(LayerPlan(8, tuple(range(count))) for count in kept)
    dense, pruned = 3 * (8 * unit + fixed), sum(count * unit + fixed * (count > 0) for count in kept)
    before, after = {"ffn": dense, "attention": 0}, {"ffn": pruned, "attention": 0}
    cut = plan(shape="uneven", layers={"ffn_channel": layers}, parameters_dense=before, parameters_pruned=after)
    found = parameters_by_layer(cut)
    assert list(found) == ["ffn"]
    expected = [(8 * unit + fixed, count * unit + fixed * (count > 0)) for count in kept]
    assert np.array(found["ffn"]) == pytest.approx(np.array(expected))


def test_parameters_of_ffns_that_differ_are_not_made_up() -> None:
    """Layers without FFN channels may have experts, and two kinds that both go have two costs."""
    narrowed, whole, none = LayerPlan(8, (0, 1)), LayerPlan(8, tuple(range(8))), LayerPlan(0, ())
    for layers, known in (
        ({"ffn_channel": (narrowed, narrowed)}, True),
        ({"ffn_channel": (narrowed, none)}, False),
        ({"expert": (none, narrowed)}, False),
        ({"expert": (narrowed, narrowed), "shared_channel": (narrowed, narrowed)}, False),
        ({"expert": (whole, whole), "shared_channel": (narrowed, narrowed)}, True),
    ):
        assert bool(parameters_by_layer(plan(layers=layers))) is known


def test_parameters_are_not_told_apart_where_heads_and_groups_both_go() -> None:
    """Two totals cannot give three costs, so nothing is made up."""
    both = {
        "gqa_group": (LayerPlan(4, (0, 1)), LayerPlan(4, (0, 1))),
        "query_head": (LayerPlan(8, (0, 2)), LayerPlan(8, (0, 2))),
    }
    assert parameters_by_layer(plan(layers=both)) == {}
