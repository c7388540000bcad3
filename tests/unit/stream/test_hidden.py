"""Stored hidden states: what comes back, what is left behind, and what is said when the disk is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.errors import ExportError
from secateur.stream.hidden import HiddenStates

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
places = pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])


def draw(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random states of (batch, 5, 4)."""
    return torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


@places
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_come_back_bit_for_bit(tmp_path: Path, on_disk: bool, dtype: torch.dtype) -> None:
    """Values (odd ones too), shape and dtype are those put in; batches may differ in size."""
    odd = draw(dtype=dtype)
    odd[0, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-8], dtype=dtype)
    kept = [odd, draw(3, 1, dtype), draw(1, 2, dtype).transpose(1, 2)]
    with HiddenStates(tmp_path if on_disk else None) as hidden:
        for states in kept:
            hidden.append(states)
        assert len(hidden) == len(list(hidden)) == 3
        for index, states in enumerate(kept):
            assert hidden[index].dtype == dtype
            assert hidden[index].shape == states.shape
            torch.testing.assert_close(hidden[index], states, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(hidden[index].signbit(), states.signbit())


@places
def test_a_batch_is_replaced_alone(tmp_path: Path, on_disk: bool) -> None:
    """The other batches keep their states, and states taken out before do not change under the reader."""
    with HiddenStates(tmp_path if on_disk else None) as hidden:
        for seed in range(3):
            hidden.append(draw(seed=seed))
        before = hidden[1]
        hidden[1] = draw(4, 9, torch.bfloat16)
        assert torch.equal(before, draw(seed=1))
        assert torch.equal(hidden[1], draw(4, 9, torch.bfloat16))
        assert torch.equal(hidden[0], draw(seed=0))
        assert torch.equal(hidden[-1], draw(seed=2))
        hidden[-1] = draw(seed=8)
        hidden.append(draw(seed=7))
        hidden[-1] = draw(seed=6)
        assert torch.equal(hidden[2], draw(seed=8))
        assert torch.equal(hidden[3], draw(seed=6))


@places
def test_there_is_no_batch_that_was_not_put_in(tmp_path: Path, on_disk: bool) -> None:
    """Reading or replacing past the end is an error, not a new batch."""
    with HiddenStates(tmp_path if on_disk else None) as hidden:
        hidden.append(draw())
        with pytest.raises(IndexError):
            hidden[1]
        with pytest.raises(IndexError):
            hidden[1] = draw()


@places
def test_states_carry_no_gradients(tmp_path: Path, on_disk: bool) -> None:
    """What is kept does not keep the graph it came from."""
    with HiddenStates(tmp_path if on_disk else None) as hidden:
        hidden.append(draw().requires_grad_() * 2)
        assert not hidden[0].requires_grad


def test_two_stores_share_a_folder(tmp_path: Path) -> None:
    """Each has its own files, and each removes only those; the folder itself stays."""
    with HiddenStates(tmp_path / "new" / "states") as first:
        first.append(draw(seed=0))
        with HiddenStates(tmp_path / "new" / "states") as second:
            second.append(draw(seed=1))
            assert torch.equal(first[0], draw(seed=0))
        assert torch.equal(first[0], draw(seed=0))
    assert list((tmp_path / "new" / "states").iterdir()) == []


@places
def test_at_the_end_nothing_is_left(tmp_path: Path, on_disk: bool) -> None:
    """Also after an error the files are gone and the store is empty."""
    with pytest.raises(KeyboardInterrupt), HiddenStates(tmp_path if on_disk else None) as hidden:
        hidden.append(draw())
        assert len(list(tmp_path.rglob("*"))) == (2 if on_disk else 0)
        raise KeyboardInterrupt
    assert len(hidden) == 0
    assert list(tmp_path.iterdir()) == []


def test_states_held_elsewhere_come_back_where_they_were() -> None:
    """A holding device is for the time in between; here the meta device stands for one that is not the CPU."""
    with HiddenStates(device=torch.device("meta")) as hidden:
        hidden.append(draw())
        assert hidden._stored[0].device == torch.device("cpu")
        held = hidden._stored[0].held
        assert isinstance(held, Tensor)
        assert held.device == torch.device("meta")


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    """The message says what could not be written and what to do; the device file refuses every byte."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    with HiddenStates(tmp_path) as hidden:
        hidden.append(draw())
        file = next(path for path in tmp_path.rglob("*") if path.is_file())
        file.unlink()
        file.symlink_to("/dev/full")
        with pytest.raises(ExportError, match=r"the disk is full: .* could not be written\. Free space"):
            hidden[0] = draw(64, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the way is an error at once, before anything is computed."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/states cannot be written"):
        HiddenStates(tmp_path / "file" / "states")
