"""What a person named as a model: a model folder, a run's folder with one in it, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import CheckpointError

_IN_A_RUN = ("recovered", "model")
_MAGIC = b"GGUF"


def given_folder(path: Path) -> Path:
    """Return the model folder at ``path``; of a run's folder the recovered model, or else the pruned one.

    Raises:
        CheckpointError: there is no model folder.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}. Give a model folder, or the folder of a run.")
    if (path / "config.json").is_file():
        return path
    for name in _IN_A_RUN:
        if (path / "manifest.json").is_file() and (path / name / "config.json").is_file():
            return path / name
    if (path / "manifest.json").is_file():
        raise CheckpointError(f"the run in {path} has no model yet. Finish it: secateur run {path / 'recipe.yml'}")
    found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} is not a model folder: it has no config.json (it holds {found}). Give the folder that holds it."
    )


def given_model(path: Path) -> Path:
    """Return the model folder or the GGUF file that ``path`` names.

    Raises:
        CheckpointError: it is neither.
    """
    if not path.is_file():
        return given_folder(path)
    require_gguf(path)
    return path


def require_gguf(path: Path) -> None:
    """Refuse a file that is not there or is no GGUF file, by its first bytes.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Give a GGUF file.") from None
    if start != _MAGIC:
        raise CheckpointError(
            f"{path} is no GGUF file: it starts with {start!r}, not {_MAGIC!r}. Write one with `secateur export FOLDER "
            "--to gguf`, or give a model folder."
        )
