"""Index arithmetic of cutting, against loops."""

from __future__ import annotations

import pytest
import torch

from secateur.families.geometry import Segment, TensorSlice
from secateur.shrink.slicing import fold_constants, kept_entries, kept_rows


def test_rows_of_kept_units_stay() -> None:
    """Units of several rows, an offset, a second run, and rows that belong to no unit."""
    runs = [(Segment("m", "out", 1, 2), 3, (0, 2)), (Segment("m", "out", 8, 1), 2, (1,))]
    expected = [
        row
        for row in range(11)
        if not (1 <= row < 7 and (row - 1) // 2 not in (0, 2)) and not (8 <= row < 10 and row - 8 not in (1,))
    ]
    assert kept_rows(runs, 11).tolist() == expected == [0, 1, 2, 5, 6, 7, 9, 10]


def test_without_cuts_every_row_stays() -> None:
    """Nothing to cut means nothing is cut."""
    assert kept_rows([], 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("runs", "num_rows"),
    [
        ([(Segment("m", "out", 0, 2), 3, (0,))], 5),
        ([(Segment("m", "out", 0, 2), 3, (0,)), (Segment("m", "out", 5, 1), 2, (0,))], 9),
    ],
    ids=["beyond the end", "overlap"],
)
def test_a_family_file_that_contradicts_the_weights_is_noticed(
    runs: list[tuple[Segment, int, tuple[int, ...]]], num_rows: int
) -> None:
    """Runs that overlap or leave the dimension are errors that name the module."""
    with pytest.raises(ValueError, match=rf"m: rows .* overlap others or exceed {num_rows}"):
        kept_rows(runs, num_rows)


def test_constants_are_folded_as_the_matrix_product_says() -> None:
    """Bias + columns @ values, accumulated in float64, given back in the bias's dtype."""
    bias, columns = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 10.0, 0.0], [0.5, 0.0, -1.0]])
    folded = fold_constants(bias, columns, [2.0, 0.25, 4.0])
    assert folded.dtype == torch.float32
    assert folded.tolist() == [1 + 2 + 2.5, 2 + 1 - 4]
    assert bias.tolist() == [1.0, 2.0], "the dense bias is not changed"
    assert fold_constants(bias.bfloat16(), columns.bfloat16(), [2.0, 0.25, 4.0]).dtype == torch.bfloat16


def test_contributions_are_accumulated_in_float64() -> None:
    """Large constants that cancel leave the small one between them, which float32 would lose."""
    bias, columns = torch.tensor([0.5]), torch.tensor([[1e8, 1.0, -1e8]])
    assert fold_constants(bias, columns, [1.0, 1.0, 1.0]).tolist() == [1.5]


def test_entries_of_stacked_slices_are_kept_per_group() -> None:
    """Three groups of four units, two entries each from 1 on; every group keeps other units, and the rest stays."""
    part = TensorSlice("t", dim=1, offset=1, width=2, stacked=True)
    kept = (0, 3, 5, 6, 8, 9)
    expected = [[at for at in range(10) if not 1 <= at < 9 or group * 4 + (at - 1) // 2 in kept] for group in range(3)]
    assert kept_entries([(part, 12, 3, kept)], 3, 10).tolist() == expected
    plain = TensorSlice("t", dim=0, offset=2, width=1)
    assert kept_entries([(plain, 4, 2, (1, 2))], 7, 7).tolist() == [0, 1, 3, 4, 6]


@pytest.mark.parametrize(
    ("kept", "num_groups", "size", "words"),
    [
        ((0, 1, 4), 2, 4, "groups would keep different numbers"),
        ((0, 4), 3, 4, "of 2 groups overlap others or exceed 4"),
        ((0, 4), 2, 3, "of 2 groups overlap others or exceed 3"),
    ],
)
def test_stacked_slices_that_contradict_the_weights_are_noticed(
    kept: tuple[int, ...], num_groups: int, size: int, words: str
) -> None:
    """Other numbers of groups, sizes or kept units are errors that name the tensor."""
    part = TensorSlice("experts.t", dim=1, offset=0, width=1, stacked=True)
    with pytest.raises(ValueError, match=rf"experts\.t: .*{words}"):
        kept_entries([(part, 8, 2, kept)], num_groups, size)
