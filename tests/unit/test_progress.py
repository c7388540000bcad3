"""Progress that nobody listens to."""

from __future__ import annotations

import pytest

from secateur.progress import Progress, silent


def test_silence_is_a_progress() -> None:
    """The default accepts everything a stage may say and lets errors through."""
    assert isinstance(silent, Progress)
    with silent("calibrate", None, "tokens") as task:
        task.advance(3)
    with pytest.raises(KeyError), silent("calibrate", 10, "tokens"):
        raise KeyError("mine")
