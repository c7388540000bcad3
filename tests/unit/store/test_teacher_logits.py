from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.records.top_classes import TopClasses
from secateur.store.teacher_logits import TeacherLogits


def some_classes(count: int, k: int = 3) -> TopClasses:
    """Return predictions of ``count`` tokens, different for every count."""
    generator = torch.Generator().manual_seed(count)
    values = torch.rand(count, k, generator=generator).log()
    indices = torch.randint(0, 70_000, (count, k), generator=generator)
    return TopClasses(values, indices, torch.rand(count, generator=generator).log())


def require_equal(found: TopClasses, expected: TopClasses) -> None:
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values.half())
    assert torch.equal(found.log_rest, expected.log_rest.float())


def test_blocks_come_back_from_whichever_file_they_are_in(tmp_path: Path) -> None:
    """Blocks without learned tokens too; log-probabilities in float16 and ids as int64."""
    blocks = [some_classes(count) for count in (4, 0, 7, 2, 5)]
    written = TeacherLogits(tmp_path / "teacher", "key")
    written.append(blocks[:3])
    written.append(blocks[3:])
    read = TeacherLogits(tmp_path / "teacher", "key")
    assert written.num_blocks == read.num_blocks == 5
    for index in (3, 0, 4, 1, 2, 0):
        for cache in (written, read):
            found = cache.load(index)
            require_equal(found, blocks[index])
            assert found.indices.dtype == torch.int64
    assert read.size_bytes == sum(path.stat().st_size for path in (tmp_path / "teacher").iterdir())


def test_impossible_classes_survive(tmp_path: Path) -> None:
    cache = TeacherLogits(tmp_path, "key")
    nothing = torch.full((1,), -torch.inf)
    cache.append([TopClasses(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), nothing)])
    assert torch.equal(cache.load(0).log_rest, nothing)


def test_what_is_there_under_another_key_is_removed(tmp_path: Path) -> None:
    """Other files stay."""
    TeacherLogits(tmp_path, "old").append([some_classes(2)])
    (tmp_path / "notes.txt").write_text("mine")
    cache = TeacherLogits(tmp_path, "new")
    assert cache.num_blocks == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_writing_goes_on_after_a_stop(tmp_path: Path) -> None:
    """A file that was not finished has no name of its own and is not looked at."""
    TeacherLogits(tmp_path, "key").append([some_classes(2), some_classes(3)])
    (tmp_path / ".blocks-000000002.safetensors.abc.part").write_bytes(b"half")
    cache = TeacherLogits(tmp_path, "key")
    assert cache.num_blocks == 2
    cache.append([some_classes(4)])
    require_equal(TeacherLogits(tmp_path, "key").load(2), some_classes(4))


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    cache = TeacherLogits(tmp_path, "key")
    cache.append([some_classes(2)])
    with pytest.raises(CheckpointError, match=r"for 1 blocks, and block 1 is asked for\. Delete the folder"):
        cache.load(1)


def test_a_gap_between_files_is_refused(tmp_path: Path) -> None:
    cache = TeacherLogits(tmp_path, "key")
    for count in (1, 2, 3):
        cache.append([some_classes(count)])
    (tmp_path / "blocks-000000001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the teacher's predictions for blocks 1 to 1\. Delete it"):
        TeacherLogits(tmp_path, "key")


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    cache = TeacherLogits(tmp_path, "key")
    cache.append([some_classes(2)])
    path = tmp_path / "blocks-000000000.safetensors"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"blocks-000000000\.safetensors cannot be read"):
            TeacherLogits(tmp_path, "key")
    with pytest.raises(CheckpointError, match=r"cannot be read: .* Delete the folder it is in"):
        cache.load(0)


def test_rounding_of_log_probabilities_is_small() -> None:
    """Float16 keeps a token's probability to half a percent, and one above a third to one part in two thousand."""
    from secateur.store.teacher_logits import as_stored

    def error(log_probabilities: Tensor) -> float:
        count = len(log_probabilities)
        classes = TopClasses(log_probabilities[:, None], torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count))
        kept = as_stored(classes).values[:, 0].double()
        return float((kept - log_probabilities.double()).expm1().abs().max())

    assert error(torch.linspace(-16, 0, 10_001)) < 5e-3
    assert error(torch.linspace(-1, 0, 1001)) < 5e-4
