"""Progress that nobody listens to."""

from __future__ import annotations

import pytest

from secateur.progress import Progress, say, silent


def test_silence_is_a_progress() -> None:
    """The default accepts everything a stage may say and lets errors through."""
    assert isinstance(silent, Progress)
    with silent("calibrate", None, "tokens") as task:
        task.advance(3)
    with pytest.raises(KeyError), silent("calibrate", 10, "tokens"):
        raise KeyError("mine")


def test_a_task_may_or_may_not_talk() -> None:
    """What is said reaches a task that can show it, and any other goes on as it was."""
    heard: list[str] = []

    class Talking:
        def advance(self, amount: int) -> None:
            del amount

        def say(self, text: str) -> None:
            heard.append(text)

    say(Talking(), "loss 2.1")
    with silent("train", 10, "tokens") as task:
        say(task, "loss 2.0")
    assert heard == ["loss 2.1"]
