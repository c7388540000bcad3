"""Token-frequency curves against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.report.page.frequency import frequency_curve


def test_points_agree_with_sorted_counts() -> None:
    """Every point has the uses of its rank and the share of the text down to it; the ends are there."""
    counts = np.random.default_rng(1).zipf(1.3, size=5000).clip(max=10**6) - 1
    curve = frequency_curve(counts)
    used = sorted((int(count) for count in counts if count), reverse=True)
    assert (curve.num_used, curve.num_tokens) == (len(used), sum(used))
    assert curve.points[0].rank == 1
    assert curve.points[-1].rank == len(used)
    assert len(curve.points) < 120
    for point in curve.points:
        assert point.per_million == pytest.approx(1e6 * used[point.rank - 1] / sum(used))
        assert point.coverage == pytest.approx(sum(used[: point.rank]) / sum(used))


@pytest.mark.parametrize("counts", [[0, 0], [3], [0, 7, 7]])
def test_tiny_texts_have_curves(counts: list[int]) -> None:
    """Nothing counted is no point; a single id is one."""
    curve = frequency_curve(np.array(counts))
    assert len(curve.points) == len([count for count in counts if count])
