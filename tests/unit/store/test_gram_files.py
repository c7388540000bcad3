"""Gram matrices survive the disk, are read one at a time, and damage is named."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import CheckpointError, ExportError
from secateur.records.gram import Grams, GramsInMemory, MixedGrams, merge_grams
from secateur.records.statistics import SiteKey
from secateur.store import gram_files
from secateur.store.gram_files import StoredGrams, read_grams, write_grams

WIDTHS = {"ffn_channel": 7, "gqa_group": 4}


def make_grams(dtype: torch.dtype = torch.float32) -> GramsInMemory:
    """Return small matrices of two layers, numbered so that text and number order differ."""
    generator = torch.Generator().manual_seed(0)
    sums = {}
    for layer in (10, 2):
        for kind, width in WIDTHS.items():
            x = torch.randn(9, width, dtype=dtype, generator=generator)
            sums[layer, kind] = x.T @ x
    return GramsInMemory(9, sums)


def written(folder: Path) -> Path:
    """Write matrices and return the tensor file."""
    grams = make_grams()
    write_grams(folder / "medical.safetensors", grams, grams.sums, {"bucket": "medical"})
    return folder / "medical.safetensors"


def test_grams_survive_the_disk(tmp_path: Path) -> None:
    """Every matrix comes back bit for bit, with the count and what was noted beside it."""
    grams = make_grams()
    path = tmp_path / "deep" / "medical.safetensors"
    write_grams(path, grams, grams.sums, {"bucket": "medical"})
    stored, metadata = read_grams(path)
    assert isinstance(stored, Grams)
    assert (stored.count, stored.sites) == (9, set(grams.sums))
    for site, matrix in grams.sums.items():
        assert torch.equal(stored.load(site), matrix)
    assert (metadata["bucket"], metadata["count"], metadata["schema_version"]) == ("medical", 9, 1)
    assert metadata["sites"] == ["gram/2/ffn_channel", "gram/2/gqa_group", "gram/10/ffn_channel", "gram/10/gqa_group"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["medical.json", "medical.safetensors"]


def test_the_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    """The library reads it, and its numbers begin at a multiple of eight bytes."""
    path, grams = written(tmp_path), make_grams()
    tensors = load_file(path)
    assert {name: tensor.shape[0] for name, tensor in tensors.items()} == {
        f"gram/{layer}/{kind}": width for layer in (2, 10) for kind, width in WIDTHS.items()
    }
    assert torch.equal(tensors["gram/10/gqa_group"], grams.load((10, "gqa_group")))
    data = path.read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert data[8:9] == b"{"


def test_many_long_names_fit_in_the_header(tmp_path: Path) -> None:
    """The room that is kept free for the header is enough, whatever the names and however many."""
    sums = {(layer, "unit" * 50): torch.ones(1, 1) for layer in range(300)}
    write_grams(tmp_path / "a.safetensors", GramsInMemory(1, sums), sums, {})
    stored, _ = read_grams(tmp_path / "a.safetensors")
    assert stored.sites == set(sums)
    assert all(stored.load(site).item() == 1.0 for site in sums)


def test_no_sites_make_an_empty_file(tmp_path: Path) -> None:
    """Nothing to write is written as nothing."""
    write_grams(tmp_path / "a.safetensors", make_grams(), [], {})
    assert read_grams(tmp_path / "a.safetensors")[0].sites == frozenset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_are_float32_on_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wider sums are rounded once; a matrix that is a view is written as it looks."""
    wide = make_grams(dtype)
    views = GramsInMemory(9, {site: matrix.repeat(2, 2)[::2, ::2] for site, matrix in wide.sums.items()})
    write_grams(tmp_path / "a.safetensors", views, views.sums, {})
    stored, _ = read_grams(tmp_path / "a.safetensors")
    for site, matrix in views.sums.items():
        assert torch.equal(stored.load(site), matrix.float())


def test_only_the_chosen_sites_are_written(tmp_path: Path) -> None:
    """A site may be named twice and is written once; others are not read at all."""
    asked: list[SiteKey] = []

    class Watched:
        count = 9

        def load(self, site: SiteKey) -> Tensor:
            asked.append(site)
            return make_grams().load(site)

    site = (2, "gqa_group")
    write_grams(tmp_path / "a.safetensors", Watched(), [site, site], {})
    assert asked == [site]
    assert read_grams(tmp_path / "a.safetensors")[0].sites == {site}


def test_mixtures_and_merged_shards_are_written_as_they_load(tmp_path: Path) -> None:
    """Stored matrices can be mixed and merged, and the outcome stored."""
    stored, _ = read_grams(written(tmp_path))
    twice = MixedGrams([merge_grams(stored, stored), stored], [0.5, 0.5])
    write_grams(tmp_path / "b.safetensors", twice, stored.sites, {})
    again, _ = read_grams(tmp_path / "b.safetensors")
    assert again.count == 27
    for site, matrix in make_grams().sums.items():
        torch.testing.assert_close(again.load(site), 3 * matrix)


def test_a_site_is_read_when_it_is_asked_for_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads no matrix, loading reads one, and loading again reads again: a caller's change changes no other."""
    path, read = written(tmp_path), []
    safe_open = gram_files.safe_open

    class Watched:
        def __init__(self, path: Path, framework: str) -> None:
            self.inner = safe_open(path, framework=framework)

        def __enter__(self) -> Watched:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr(gram_files, "safe_open", Watched)
    stored, _ = read_grams(path)
    assert read == []
    stored.load((10, "gqa_group")).zero_()
    assert read == ["gram/10/gqa_group"]
    assert torch.equal(stored.load((10, "gqa_group")), make_grams().load((10, "gqa_group")))
    assert read == ["gram/10/gqa_group"] * 2


# -- damage ----------------------------------------------------------------------------------------------------------


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file through its data."""
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no matrices": (Path.unlink, r"medical\.safetensors cannot be read"),
    "no JSON": (lambda f: f.with_suffix(".json").unlink(), r"medical\.json cannot be read"),
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:-9]), r"medical\.safetensors cannot be read"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:99]), r"medical\.safetensors cannot be read"),
    "empty": (lambda f: f.write_bytes(b""), r"medical\.safetensors cannot be read"),
    "not safetensors": (lambda f: f.write_text("hello, hello"), r"medical\.safetensors cannot be read"),
    "not JSON": (lambda f: f.with_suffix(".json").write_text("{"), r"medical\.json cannot be read"),
    "another version": (lambda f: edit_json(f.with_suffix(".json"), lambda d: d.update(schema_version=2)), "another v"),
    "a site too many": (
        lambda f: edit_json(f.with_suffix(".json"), lambda d: d["sites"].append("gram/3/ffn_channel")),
        "lacks 'gram/3/ffn_channel'",
    ),
    "no count": (lambda f: edit_json(f.with_suffix(".json"), lambda d: d.pop("count")), "lacks 'count'"),
    "no sites": (lambda f: edit_json(f.with_suffix(".json"), lambda d: d.pop("sites")), "lacks 'sites'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    """The message says which file, and what to do."""
    file = written(tmp_path)
    damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_grams(file)
    assert "Delete it; it will be made again." in str(caught.value)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda f: f.write_bytes(f.read_bytes()[:-9]), lambda f: f.write_text("hello, hello")]
)
def test_damage_after_opening_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """A file that changes while it is in use is refused too."""
    stored, _ = read_grams(written(tmp_path))
    damage(stored.path)
    with pytest.raises(CheckpointError, match=r"medical\.safetensors cannot be read.*Delete it; it will be made again"):
        stored.load((2, "gqa_group"))


def test_a_site_that_is_not_there_is_named(tmp_path: Path) -> None:
    """It is our error, not the library's."""
    stored, _ = read_grams(written(tmp_path))
    with pytest.raises(CheckpointError, match=r"medical\.safetensors lacks 'gram/5/gqa_group'"):
        replace(stored, count=1).load((5, "gqa_group"))
    assert isinstance(stored, StoredGrams)


class Failing:
    """Matrices whose second one cannot be had."""

    count = 9

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def load(self, site: SiteKey) -> Tensor:
        """Return the matrix of layer 2; fail at others."""
        if site[0] != 2:
            raise self.error
        return torch.ones(3, 3)


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    """Whatever stopped the writing, the earlier matrices are untouched and nothing else is left."""
    file = written(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(type(error)):
        write_grams(file, Failing(error), [(2, "ffn_channel"), (3, "ffn_channel")], {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    """The message names what was being written, and nothing is left."""
    full = Failing(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ExportError, match=r"the disk is full: .*medical\.safetensors could not be written"):
        write_grams(tmp_path / "medical.safetensors", full, [(3, "ffn_channel")], {})
    assert list(tmp_path.iterdir()) == []
