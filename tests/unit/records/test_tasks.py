"""Results of tasks: differences are paired by document, and only where both models were asked the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from secateur.records.tasks import TaskMetric, TaskResults, TaskScore


def score(samples: tuple[float, ...], fingerprint: str = "f", **changes: object) -> TaskScore:
    """Return a score whose only metric is the mean of these."""
    value = sum(samples) / len(samples) if samples else 0.5
    metric = TaskMetric("acc", "none", value, 0.1, True, samples)
    return replace(TaskScore("terms", "1.0", 0, 4, fingerprint, (metric,)), **changes)  # type: ignore[arg-type]


def results(dense: TaskScore, result: TaskScore) -> TaskResults:
    """Return both models' scores on one task."""
    return TaskResults("0.4.13", None, {"dense": {"terms": dense}, "pruned": {"terms": result}})


def test_a_difference_is_paired_by_document() -> None:
    """Documents that both get right or wrong count for nothing in its error."""
    found = results(score((1.0, 1.0, 0.0, 0.0)), score((1.0, 0.0, 0.0, 0.0)))
    gap = found.difference("terms", found.models["pruned"]["terms"].metrics[0])
    assert gap is not None
    assert gap.mean == -0.25
    assert gap.stderr == pytest.approx(math.sqrt((0.75**2 + 3 * 0.25**2) / 3 / 4))


@pytest.mark.parametrize(
    ("dense", "result"),
    [
        (score((1.0, 0.0)), score((1.0, 0.0), "other")),
        (score((1.0, 0.0)), score((1.0,))),
        (score(()), score(())),
    ],
)
def test_there_is_no_difference_of_other_documents(dense: TaskScore, result: TaskScore) -> None:
    assert results(dense, result).difference("terms", result.metrics[0]) is None
    assert results(dense, result).difference("another", result.metrics[0]) is None


def test_the_record_goes_through_json() -> None:
    """What is read equals what was written; the differences stand beside it for readers."""
    found = results(score((1.0, 0.0)), score((0.0, 0.0), num_fewshot=None, is_group=True))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["differences"] == [{"task": "terms", "metric": "acc", "filter": "none", "mean": -0.5, "stderr": 0.5}]
    assert TaskResults.from_dict(data) == found
    with pytest.raises(TypeError, match="schema version 9"):
        TaskResults.from_dict({**data, "schema_version": 9})
