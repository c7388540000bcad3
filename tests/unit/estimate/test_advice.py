"""What is said where a run does not fit: real keys, and each saves what it says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.recipe import with_overrides
from secateur.records.estimate import Machine
from tests.unit.estimate.papers import on_paper, recipe

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fit": {"prune": {"method": "activation_norm", "budget": {"channels": 0.5}, "reconstruct": "dense"}},
    "stream": {"prune": {"method": "activation_norm", "budget": {"channels": 0.5}, "reconstruct": "pruned"}},
    "two kinds": {"prune": {"units": ["ffn_channel", "gqa_group"], "budget": {"parameters": 0.2}, "method": "kfac"}},
    "trained": {"recover": {}},
    "gradients": {"prune": {"method": "taylor", "budget": {"channels": 0.5}}},
}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(RECIPES)),
    block=st.sampled_from([128, 256, 1024]),
    batch=st.integers(1, 16),
    tokens=st.sampled_from([1024, 65_536]),
)
def test_each_advice_names_a_key_and_saves_what_it_says(name: str, block: int, batch: int, tokens: int) -> None:
    """Set on the recipe, it leaves exactly the predicted peak, which is lower."""
    calibrate = {"max_tokens": tokens, "block_size": block, "batch_size": batch}
    asked = recipe(**RECIPES[name], calibrate=calibrate)
    found = on_paper(asked)
    for advice in found.advice:
        changed = on_paper(with_overrides(asked, {advice.key: advice.value}))
        before, after = (
            (found.peak_bytes, changed.peak_bytes) if advice.of == "memory" else (found.disk_bytes, changed.disk_bytes)
        )
        assert after == advice.left_bytes < before
        assert advice.saves_bytes == before - after
        assert advice.seconds == pytest.approx(changed.seconds - found.seconds)


@pytest.mark.parametrize("name", ["plain", "trained", "stream"])
def test_what_is_to_be_set_together_makes_it_fit(name: str) -> None:
    """On a machine with a little less memory than it needs; set together, the predicted peak is within it."""
    asked = recipe(**RECIPES[name])
    needed = on_paper(asked).peak_bytes
    machine = Machine(needed, round(0.8 * needed), 10**12)
    found = on_paper(asked, machine)
    assert found.fits_memory is False and found.fits_disk is True
    assert found.together
    assert on_paper(with_overrides(asked, found.together), machine).fits_memory is True


def test_where_nothing_helps_nothing_is_promised() -> None:
    """The weights alone are too large."""
    found = on_paper(recipe(), Machine(1000, 1000, 10**12))
    assert found.fits_memory is False and found.together == {}


def test_a_full_disk_is_a_reason_of_its_own() -> None:
    """Without Gram matrices less lies there."""
    asked = recipe(**RECIPES["fit"])
    needed = on_paper(asked).disk_bytes
    found = on_paper(asked, Machine(10**12, 10**12, needed - 1))
    assert found.fits_memory is True and found.fits_disk is False
    assert found.together == {"prune.reconstruct": "none"}
