"""Records to disk and back, folders that appear whole, and what is said about files that cannot be read or written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from secateur.errors import CheckpointError, ExportError
from secateur.records.gradients import SUMS, GradientStatistics, UnitGradients
from secateur.records.masks import LowRank, MaskStatistics, MaskStep
from secateur.records.routing import EXTREMES, RoutingSums
from secateur.records.routing import SUMS as ROUTING_SUMS
from secateur.records.scores import Scores
from secateur.records.statistics import BucketStatistics, Moments, SequenceSums
from secateur.store.artifacts import (
    STATISTICS_VERSION,
    atomic_folder,
    digest,
    disk_errors,
    read_gradients,
    read_json,
    read_masks,
    read_scores,
    read_statistics,
    statistics_digest,
    write_gradients,
    write_json,
    write_masks,
    write_scores,
    write_statistics,
    write_text,
)


def draw(size: int, seed: int) -> Tensor:
    """Return float64 numbers that no shorter type can hold."""
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 3


def make_routing(seed: int) -> RoutingSums:
    """Return sums of three experts."""
    sums = {name: draw(3, seed + i) for i, name in enumerate((*ROUTING_SUMS, *EXTREMES))}
    return RoutingSums(7, **sums, logits=draw(3, seed + 20), logit_products=draw(9, seed + 21).reshape(3, 3))


def make_statistics(seed: int = 0) -> BucketStatistics:
    """Return small statistics with two layers (numbered so that text and number order differ) and two taps."""
    moments = {
        (layer, tap): Moments(7, draw(4, seed + layer), draw(4, seed + 1), draw(4, seed + 2))
        for layer in (2, 10)
        for tap in ("ffn_channel", "gqa_group")
    }
    return BucketStatistics(
        num_tokens=7,
        num_blocks=2,
        token_counts=torch.tensor([0, 3, 4]),
        moments=moments,
        sequences={site: SequenceSums(2, draw(4, seed + 3 + site[0])) for site in moments},
        linear_abs={(layer, f"ffn_channel.linear{i}"): draw(4, seed + i) for layer in (2, 10) for i in (0, 1)},
        cosine_sum=draw(2, seed),
        sublayer_cosine_sum={"attention": draw(2, seed + 4), "ffn": draw(2, seed + 5)},
        documents=torch.tensor([5, 2**62 + 1]),
        corpus_fingerprint="abc",
        tokens_per_s=12.5,
        routing={(layer, "expert"): make_routing(seed + layer) for layer in (2, 10)},
    )


def make_gradients() -> GradientStatistics:
    """Return small gradient sums of two layers."""
    units = {
        (layer, "ffn_channel"): UnitGradients(2, **{name: draw(3, seed + layer) for seed, name in enumerate(SUMS)})
        for layer in (2, 10)
    }
    return GradientStatistics(7, units)


def make_scores() -> Scores:
    """Return small scores of two kinds in two layers."""
    values = {"ffn_channel": [draw(4, 0), draw(3, 1)], "gqa_group": [draw(2, 2), draw(2, 3)]}
    return Scores("contextual", {"at": "linear"}, ("medical", "law"), values, "fingerprint")


def same(first: object, second: object) -> bool:
    """Return whether two records are equal, tensors bit for bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    sums = BucketStatistics | Moments | SequenceSums | RoutingSums
    if isinstance(first, sums | GradientStatistics | UnitGradients | Scores | MaskStatistics | LowRank):
        assert isinstance(second, type(first))
        return all(same(getattr(first, item.name), getattr(second, item.name)) for item in fields(first))
    return bool(first == second)


# -- round trips -----------------------------------------------------------------------------------------------------


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    """Every sum comes back bit for bit, in the same order, with what was noted beside it."""
    written = make_statistics()
    write_statistics(tmp_path / "a" / "medical.safetensors", written, {"bucket": "medical"})
    read, metadata = read_statistics(tmp_path / "a" / "medical.safetensors")
    assert same(written, read)
    assert metadata["bucket"] == "medical"
    assert metadata["schema_version"] == STATISTICS_VERSION
    assert not same(written, replace(read, num_tokens=8))


def test_statistics_of_older_runs_say_nothing_of_experts(tmp_path: Path) -> None:
    """Files that were written before there were sums of experts are those of dense models, and stay readable."""
    file = tmp_path / "medical.safetensors"
    written = replace(make_statistics(), routing={})
    write_statistics(file, written, {})
    edit_json(file.with_suffix(".json"), lambda data: data.pop("routing_counts"))
    assert same(written, read_statistics(file)[0])


def test_statistics_from_before_logits_were_noted_stay_readable(tmp_path: Path) -> None:
    """They say nothing of what routers compute."""
    file = tmp_path / "medical.safetensors"
    statistics = make_statistics()
    routing = {site: replace(sums, logits=None, logit_products=None) for site, sums in statistics.routing.items()}
    write_statistics(file, replace(statistics, routing=routing), {})
    assert same(replace(statistics, routing=routing), read_statistics(file)[0])


def test_gradients_survive_the_disk(tmp_path: Path) -> None:
    """Every sum comes back bit for bit."""
    write_gradients(tmp_path / "a" / "medical.gradients.safetensors", make_gradients(), {"bucket": "medical"})
    assert same(make_gradients(), read_gradients(tmp_path / "a" / "medical.gradients.safetensors"))


def make_masks() -> MaskStatistics:
    """Return masks of two sites after two steps."""
    units = {(0, "ffn_channel"): draw(5, 1), (11, "gqa_group"): draw(3, 2)}
    return MaskStatistics(96, 0.24, units, (MaskStep(3.5, 0.01, 0.1), MaskStep(3.25, 0.2, 0.25)))


def test_masks_survive_the_disk(tmp_path: Path) -> None:
    """Every probability and every step comes back as it was; what is missing or of another version is said."""
    file = tmp_path / "medical.masks.safetensors"
    write_masks(file, make_masks(), {"bucket": "medical"})
    assert same(make_masks(), read_masks(file))
    factors = {"model.layers.0.mlp.up_proj": (draw(6, 3).reshape(2, 3), draw(8, 4).reshape(4, 2))}
    adapted = replace(make_masks(), adapters=LowRank(1.5, factors))
    write_masks(file, adapted, {"bucket": "medical"})
    assert same(adapted, read_masks(file)) and not same(make_masks(), read_masks(file))
    edit_json(file.with_suffix(".json"), lambda data: data.pop("steps"))
    with pytest.raises(CheckpointError, match=r"masks\.safetensors lacks 'steps'. Delete it"):
        read_masks(file)
    edit_json(file.with_suffix(".json"), lambda data: data.update(schema_version=0))
    with pytest.raises(CheckpointError, match=r"has another version of the masks. Delete it"):
        read_masks(file)


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    """Every score comes back bit for bit, with the method, its options and the buckets."""
    for scores in (make_scores(), replace(make_scores(), cumulative=True)):
        write_scores(tmp_path / "contextual.safetensors", scores)
        assert same(scores, read_scores(tmp_path / "contextual.safetensors"))


def test_tensors_that_are_views_are_written_as_they_look(tmp_path: Path) -> None:
    """A slice of a larger tensor is saved as the slice."""
    scores = replace(make_scores(), values={"ffn_channel": [draw(8, 0)[::2]]})
    write_scores(tmp_path / "s.safetensors", scores)
    assert same(list(scores.values["ffn_channel"]), read_scores(tmp_path / "s.safetensors").values["ffn_channel"])


def test_text_is_utf_8_and_json_is_readable(tmp_path: Path) -> None:
    """Names in any script are written as they are; JSON has a line per entry."""
    write_text(tmp_path / "a.txt", "Łódź ✂")
    assert (tmp_path / "a.txt").read_bytes().decode("utf-8") == "Łódź ✂"
    write_json(tmp_path / "a.json", {"town": "Łódź", "n": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "town": "Łódź",\n "n": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"town": "Łódź", "n": 1}


def test_the_digest_is_of_the_content() -> None:
    """Equal data has an equal digest whatever the order of its keys; any difference shows."""
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert len({digest(1), digest(2), digest("1"), digest([1]), digest(1, 2), digest([1, 2]), digest(None)}) == 7


def test_the_statistics_digest_is_of_the_sums(tmp_path: Path) -> None:
    """It survives the disk and does not depend on speed; another sum or count is another digest."""
    statistics = make_statistics()
    write_statistics(tmp_path / "a.safetensors", statistics, {})
    assert statistics_digest(read_statistics(tmp_path / "a.safetensors")[0]) == statistics_digest(statistics)
    assert statistics_digest(replace(statistics, tokens_per_s=1.0)) == statistics_digest(statistics)
    assert statistics_digest(make_statistics(seed=1)) != statistics_digest(statistics)
    site = (2, "ffn_channel")
    more = {**statistics.moments, site: replace(statistics.moments[site], count=8)}
    assert statistics_digest(replace(statistics, moments=more)) != statistics_digest(statistics)
    other = {**statistics.routing, (2, "expert"): make_routing(9)}
    assert statistics_digest(replace(statistics, routing=other)) != statistics_digest(statistics)


# -- damage ----------------------------------------------------------------------------------------------------------


def statistics_file(folder: Path) -> Path:
    """Write statistics and return the tensor file."""
    write_statistics(folder / "medical.safetensors", make_statistics(), {})
    return folder / "medical.safetensors"


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file through its data."""
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (Path.unlink, r"medical\.safetensors cannot be read"),
    "no JSON": (lambda f: f.with_suffix(".json").unlink(), r"medical\.json cannot be read"),
    "half the tensors": (lambda f: f.write_bytes(f.read_bytes()[:-9]), r"medical\.safetensors cannot be read"),
    "not safetensors": (lambda f: f.write_text("hello"), r"medical\.safetensors cannot be read"),
    "not JSON": (lambda f: f.with_suffix(".json").write_text("{"), r"medical\.json cannot be read"),
    "JSON of another kind": (lambda f: f.with_suffix(".json").write_text("[1]"), "holds one list"),
    "another version": (
        lambda f: edit_json(f.with_suffix(".json"), lambda d: d.update(schema_version=1)),
        "another version .* calibrate again",
    ),
    "a site too many": (
        lambda f: edit_json(f.with_suffix(".json"), lambda d: d["counts"].update({"moments/3/ffn_channel": 1})),
        "lacks 'moments/3/ffn_channel/sum'. Delete it and calibrate again",
    ),
    "a key too few": (
        lambda f: edit_json(f.with_suffix(".json"), lambda d: d.pop("num_tokens")),
        "lacks 'num_tokens'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_statistics_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    """The message says which file, and to delete it."""
    file = statistics_file(tmp_path)
    damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_statistics(file)
    assert "Delete it" in str(caught.value)


def test_damaged_gradients_are_named(tmp_path: Path) -> None:
    """What is missing, or of another version, is said with the file's name."""
    write_gradients(tmp_path / "g.safetensors", make_gradients(), {})
    edit_json(tmp_path / "g.json", lambda data: data["counts"].update({"units/3/ffn_channel": 1}))
    with pytest.raises(CheckpointError, match=r"g\.safetensors lacks 'units/3/ffn_channel/mask_sq'. Delete it"):
        read_gradients(tmp_path / "g.safetensors")
    edit_json(tmp_path / "g.json", lambda data: data.update(schema_version=0))
    with pytest.raises(CheckpointError, match=r"g\.safetensors has another version of the gradients. Delete it"):
        read_gradients(tmp_path / "g.safetensors")


@pytest.mark.parametrize("key", ["method", "options", "buckets", "layers", "inputs_fingerprint"])
def test_damaged_scores_are_named(tmp_path: Path, key: str) -> None:
    """A missing entry is our error with the file's name, not a KeyError."""
    write_scores(tmp_path / "s.safetensors", make_scores())
    edit_json(tmp_path / "s.json", lambda data: data.pop(key))
    with pytest.raises(CheckpointError, match=rf"s\.safetensors lacks '{key}'"):
        read_scores(tmp_path / "s.safetensors")


def test_scores_without_a_layer_are_named(tmp_path: Path) -> None:
    """A layer that is promised and not there is said."""
    write_scores(tmp_path / "s.safetensors", make_scores())
    edit_json(tmp_path / "s.json", lambda data: data["layers"].update(ffn_channel=3))
    with pytest.raises(CheckpointError, match="lacks 'ffn_channel/2'"):
        read_scores(tmp_path / "s.safetensors")


# -- whole folders ---------------------------------------------------------------------------------------------------


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    """Until the block ends well nobody sees it; afterwards nothing else is left."""
    with atomic_folder(tmp_path / "deep" / "model") as work:
        (work / "inner").mkdir()
        (work / "inner" / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()
    assert (tmp_path / "deep" / "model" / "inner" / "a").read_text() == "1"
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "model"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Nothing of the old content stays beside the new."""
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_folder(target) as work:
            (work / name).write_text(name)
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_folder_is_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    """Whatever stopped the work, the earlier result is untouched."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(error), atomic_folder(target) as work:
        (work / "a").write_text("half")
        raise error("stop")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_when_the_last_rename_fails_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Even between the two renames of a replacement the old content is not lost."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    rename, calls = os.replace, []

    def fail_second(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise error("stop")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(error), atomic_folder(target) as work:
        (work / "a").write_text("new")
    assert len(calls) == 3
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    """Folder and files are as the user's umask wants them, not private as temporary folders are."""
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "model") as work:
            (work / "inner").mkdir(mode=0o700)
            (work / "inner" / "a").write_text("1")
            (work / "inner" / "a").chmod(0o600)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model", *sorted((tmp_path / "model").rglob("*")))]
    assert modes == [0o755, 0o755, 0o644]


# -- the disk says no ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_words(tmp_path: Path, number: int) -> None:
    """The message names what was being written, and what to do."""
    with (
        pytest.raises(ExportError, match=r"the disk is full: .*model could not be written. Free space"),
        disk_errors(tmp_path / "model"),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR])
def test_a_forbidden_place_is_said_in_words(tmp_path: Path, number: int) -> None:
    """The system's own reason is part of the message."""
    with (
        pytest.raises(ExportError, match=r"model cannot be written \(.+\)\. Choose another output"),
        disk_errors(tmp_path / "model"),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "I/O error"), SafetensorError("invalid dtype"), ValueError("ours"), KeyboardInterrupt()],
)
def test_other_errors_pass_through(tmp_path: Path, error: BaseException) -> None:
    """What is not about the disk is not dressed up as if it were."""
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path / "model"):
        raise error
    assert caught.value is error


def test_a_full_disk_as_safetensors_says_it(tmp_path: Path) -> None:
    """The library has its own exception for it."""
    with pytest.raises(ExportError, match="the disk is full"), disk_errors(tmp_path):
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')
