"""Serving a model over HTTP in OpenAI's form, by servers that exist: transformers' or, for a GGUF file, llama.cpp's."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from secateur.errors import CheckpointError, ExportError, UnavailableError
from secateur.export.llama_server import require_free_port, server_command, server_environment


def check_serving(model: Path, host: str, port: int, *, max_new_tokens: int | None = None) -> None:
    """Refuse what cannot be served, before anything is loaded.

    Raises:
        ConfigError: nothing can listen there.
        UnavailableError: a package is missing.
        CheckpointError: transformers' server cannot be told of this folder, or it is no model.
    """
    require_free_port(host, port)
    if model.is_dir():
        _check_folder(model)
    else:
        server_command(model, host, port, max_new_tokens=max_new_tokens or -1)


def serve(model: Path, host: str, port: int, *, device: str = "auto", max_new_tokens: int | None = None) -> None:
    """Serve a model folder or a GGUF file until Ctrl-C; the model's name there is that of the folder.

    The process's working directory becomes the folder's parent.

    Raises:
        ExportError: llama.cpp ended by itself.
    """
    if model.is_dir():
        _serve_folder(model, host, port, device)
    else:
        _serve_gguf(server_command(model, host, port, max_new_tokens=max_new_tokens or -1))


def _check_folder(folder: Path) -> None:
    from transformers.utils.import_utils import is_serve_available

    from secateur.store.checkpoints import resolve_model

    if not is_serve_available():
        raise UnavailableError(
            'transformers\' server needs packages that are not installed. Run: pip install "transformers[serving]"'
        )
    if {"@", ":"} & set(folder.resolve().name):
        raise CheckpointError(
            f"transformers' server would read the '@' or ':' in {folder.resolve().name!r} as a revision or a file. "
            "Rename the folder."
        )
    resolve_model(str(folder))


def _serve_folder(folder: Path, host: str, port: int, device: str) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.serve import Serve

    _announce_class(folder)
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # the server's list of models fails without it
    place = folder.resolve()
    os.chdir(place.parent)  # what the server is given is the name that requests must use, so not a path
    with suppress(KeyboardInterrupt):  # which it raises again when it has ended well
        Serve(force_model=place.name, host=host, port=port, device=device)


def _announce_class(folder: Path) -> None:
    """Put the class of a model whose layers differ where transformers' server looks for it: under its own name."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for name in config.architectures or ():
        if not hasattr(transformers, name):
            setattr(transformers, name, model_class)


def _serve_gguf(command: list[str]) -> None:
    process = subprocess.Popen(command, env=server_environment())
    try:
        code = process.wait()
    except KeyboardInterrupt:  # which the terminal sent to the server too
        process.terminate()
        process.wait()
        return
    if code:
        raise ExportError(f"llama.cpp's server ended with status {code}; what it said stands above.")
