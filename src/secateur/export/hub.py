"""Putting a model folder on the Hugging Face hub: what would go up is decided and checked first, then sent at once.

Only files that belong to a model go up, by name: statistics, recipes and whatever else lies in the folder stay here.
Paths of this machine are cut out of the JSON files; keys and tokens in any text stop everything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, ConfigError, ExportError, UnavailableError
from secateur.export.given import require_gguf
from secateur.export.huggingface import PLAN_FILE
from secateur.export.licences import Terms, licence_terms
from secateur.export.model_card import PLACE, read_front_matter
from secateur.store.artifacts import read_json
from secateur.store.checkpoints import load_tokenizer, resolve_model

_CARD, _CONFIG, _NOTICE = "README.md", "config.json", "Notice"
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_ALLOWED = (
    *(_CARD, _CONFIG, PLAN_FILE, "generation_config.json", *_WEIGHTS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
}
_WORD_LISTS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_PATH_KEY = re.compile(r"(name_or_path|_path|_file|_dir|\bmodel)$")
_ROOTED = re.compile(r"(/|~/|[A-Za-z]:[/\\]|\\\\)")
_HOME = re.compile(r"(/home/|/Users/|/root/|[A-Za-z]:\\Users\\)[^\s\"'`)>]*")


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One file of the repository.

    Attributes:
        name: in the repository.
        source: the file here, or its changed content.
        size_bytes: of what goes up.
    """

    name: str
    source: Path | bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Upload:
    """What would go up, and what to know first.

    Attributes:
        repo_id: on the hub, with its owner.
        files: that go up, by name.
        left_out: names in the folder that stay here.
        terms: what the dense model's licence asks.
        unmet: duties of the licence that this upload does not meet.
        notes: what was changed on the way, and what to look at.
    """

    repo_id: str
    files: tuple[UploadFile, ...]
    left_out: tuple[str, ...]
    terms: Terms
    unmet: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


def plan_upload(folder: Path, repo_id: str, *, ggufs: Sequence[Path] = ()) -> Upload:
    """Return what would go up from a model folder, after checking that it is a whole model that may be shared.

    Args:
        folder: as ``secateur run`` writes it.
        repo_id: ``owner/name``.
        ggufs: GGUF files of the same model.

    Raises:
        ConfigError: the repository's name is not one.
        CheckpointError: config, weights or tokenizer are missing or do not fit each other.
        ExportError: there is no model card with a licence, or a text holds something secret.
    """
    _require_repo_id(repo_id)
    metadata = _checked_card(folder)
    _require_whole_model(folder)
    code = _code_files(folder)
    names = sorted(item.name for item in folder.iterdir())
    chosen = [name for name in names if _is_allowed(name, code) and (folder / name).is_file()]
    _refuse_secrets(folder, chosen)
    files, notes = _prepared(folder, chosen, repo_id)
    files += [_gguf_file(path) for path in ggufs]
    config = read_json(folder / _CONFIG)
    terms = licence_terms(metadata, base_model=_base_name(metadata), model_type=str(config.get("model_type", "")))
    if terms.notice and not any(name.upper().startswith("NOTICE") for name in chosen):
        files.append(_bytes_file(_NOTICE, f"{terms.notice}\n"))
        notes.append("a file named Notice is added, because the licence asks for it")
    _refuse_doubles(files)
    left_out = tuple(name for name in names if name not in chosen)
    return Upload(repo_id, tuple(files), left_out, terms, tuple(_unmet(terms, repo_id, chosen)), tuple(notes))


def push(upload: Upload, *, private: bool = False, revision: str | None = None, api: Any = None) -> str:
    """Send an upload in one commit and return where it can be seen.

    The repository is made if there is none. Weight files that an earlier upload left there go in the same commit,
    because loaders would take them for this model's.

    Args:
        upload: from ``plan_upload``.
        private: makes the repository private; one that exists and is public is refused.
        revision: branch; made if there is none. None is the main one.
        api: a ``huggingface_hub.HfApi``; None takes the user's own.

    Raises:
        UnavailableError: not logged in, no connection, or the hub refuses.
        ExportError: the repository is public, and private was asked for; or the hub refuses the model card.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = api or HfApi()
    with _hub_errors(upload.repo_id):
        api.whoami()
        api.create_repo(upload.repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(upload.repo_id).private:
            raise ExportError(
                f"{upload.repo_id} exists and is public, and --private was given. Nothing was sent; make it private on "
                "its settings page, or choose another name."
            )
        if revision:
            api.create_branch(upload.repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(upload.repo_id, revision=revision)
        operations: list[Any] = [CommitOperationDelete(name) for name in stale_files(there, upload)]
        operations += [CommitOperationAdd(file.name, _source(file)) for file in upload.files]
        done = api.create_commit(
            upload.repo_id, operations, commit_message="Upload a model pruned with secateur", revision=revision
        )
    return str(done.commit_url)


def stale_files(there: Iterable[str], upload: Upload) -> list[str]:
    """Return the weight files in the repository that are not of this upload; GGUF files stay."""
    ours = {file.name for file in upload.files}
    suffixes = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    return sorted(name for name in there if name.endswith(suffixes) and "/" not in name and name not in ours)


# -- checks ------------------------------------------------------------------------------------------------------------


def _require_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name of a hub repository: {error} Give owner/name.") from None
    if "/" not in repo_id:
        raise ConfigError(f"repository {repo_id!r} has no owner. Give owner/name, where owner is you or your team.")


def _checked_card(folder: Path) -> dict[str, Any]:
    if not (folder / _CARD).is_file():
        raise ExportError(f"{folder} has no model card ({_CARD}). `secateur run` writes one; copy it there.")
    metadata = read_front_matter(folder)
    if not isinstance(metadata.get("license"), str) or not metadata["license"].strip():
        raise ExportError(
            f"{folder / _CARD} states no licence, because the dense model's card states none. Find out which it has, "
            "and write `license: ...` between the two lines of dashes at the top of the file."
        )
    return metadata


def _require_whole_model(folder: Path) -> None:
    """Refuse a folder whose files are not all there or do not fit each other; nothing large is read."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({*read_json(index).get("weight_map", {}).values()} - {item.name for item in folder.iterdir()})
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which its index names. Export the model again.")
    checkpoint = resolve_model(str(folder))
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            stored |= set(weights.keys())
    missing = sorted(set(checkpoint.shapes) - stored)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights, the first {missing[0]}. Export the model again.")
    load_tokenizer(checkpoint)


def _code_files(folder: Path) -> set[str]:
    """Return the Python files that the configuration names as its own modelling code."""
    found = set()
    for file in (_CONFIG, "tokenizer_config.json"):
        auto_map = read_json(folder / file).get("auto_map") if (folder / file).is_file() else None
        named = auto_map.values() if isinstance(auto_map, Mapping) else ()
        for value in named:
            for name in value if isinstance(value, list | tuple) else [value]:
                if isinstance(name, str) and "--" not in name:
                    found.add(f"{name.split('.')[0]}.py")
    return found


def _is_allowed(name: str, code: set[str]) -> bool:
    return name in code or any(fnmatchcase(name, pattern) for pattern in _ALLOWED)


def _refuse_secrets(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if name.endswith(".safetensors") or name in _WORD_LISTS:
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        for what, pattern in _SECRETS.items():
            if match := pattern.search(text):
                line = text.count("\n", 0, match.start()) + 1
                raise ExportError(f"{folder / name}, line {line}, holds what looks like {what}. Take it out first.")


def _unmet(terms: Terms, repo_id: str, names: Sequence[str]) -> Iterator[str]:
    if not terms.allows_name(repo_id):
        yield f'the repository\'s name must begin with "{terms.name_prefix}", and {repo_id.split("/")[-1]!r} does not'
    if terms.duties and not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in names):
        yield f"no file with the licence's text lies in the folder; add it as LICENSE{_from(terms)}"


def _from(terms: Terms) -> str:
    return f" (see {terms.url})" if terms.url else ""


def _base_name(metadata: Mapping[str, Any]) -> str:
    base = metadata.get("base_model")
    return base if isinstance(base, str) else ""


# -- files -------------------------------------------------------------------------------------------------------------


def _prepared(folder: Path, names: Sequence[str], repo_id: str) -> tuple[list[UploadFile], list[str]]:
    """Return the files, without paths of this machine, and what was changed."""
    files, notes = [], []
    for name in names:
        path = folder / name
        if name == _CARD:
            text = path.read_text(encoding="utf-8")
            files.append(_bytes_file(name, text.replace(PLACE, repo_id)))
            notes += [f"{name} shows a path of this machine: {match[0]}" for match in _HOME.finditer(text)]
        elif name in (_CONFIG, PLAN_FILE, "generation_config.json", "tokenizer_config.json"):
            data = read_json(path)
            clean = without_paths(data)
            if clean == data:
                files.append(UploadFile(name, path, path.stat().st_size))
            else:
                files.append(_bytes_file(name, json.dumps(clean, indent=1, ensure_ascii=False) + "\n"))
                notes.append(f"{name} names a path of this machine; only its last part goes up")
        else:
            files.append(UploadFile(name, path, path.stat().st_size))
    return files, notes


def without_paths(value: Any, key: str = "") -> Any:
    """Return plain data in which an absolute path under a key that names one is only its last part."""
    if isinstance(value, Mapping):
        return {name: without_paths(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, key) for item in value]
    if isinstance(value, str) and _PATH_KEY.search(key) and _ROOTED.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _gguf_file(path: Path) -> UploadFile:
    require_gguf(path)
    return UploadFile(path.name, path, path.stat().st_size)


def _bytes_file(name: str, text: str) -> UploadFile:
    content = text.encode()
    return UploadFile(name, content, len(content))


def _refuse_doubles(files: Sequence[UploadFile]) -> None:
    seen: set[str] = set()
    for file in files:
        if file.name in seen:
            raise ConfigError(f"two files would be called {file.name} in the repository. Rename one of them.")
        seen.add(file.name)


def _source(file: UploadFile) -> str | bytes:
    return file.source if isinstance(file.source, bytes) else str(file.source)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UnavailableError(
            "you are not logged in to the hub. Run `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from None
    except OfflineModeIsEnabled:
        raise UnavailableError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            raise UnavailableError("the hub does not accept your token. Run `hf auth login` again.") from None
        if status == 403:
            raise UnavailableError(
                f"your token may not write to {repo_id}. Use one with write access, or a repository of your own."
            ) from None
        raise UnavailableError(f"the hub refused: {_first_line(error)} Try again later, or another name.") from None
    except ValueError as error:  # what the library makes of the hub's own check of the card
        raise ExportError(f"the hub refuses the model card: {_first_line(error)} Correct {_CARD}.") from None
    except (HTTPError, ConnectionError) as error:
        raise UnavailableError(
            f"the hub could not be reached ({_first_line(error)}). Check the connection, and run the command again."
        ) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
