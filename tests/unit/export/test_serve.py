"""Serving: what cannot be served is refused before anything is loaded, and what can be answers over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import CheckpointError, ConfigError, UnavailableError
from secateur.export import llama_server
from secateur.export.gguf import export_gguf
from secateur.export.llama_server import describe_gguf, require_free_port, server_command
from secateur.export.serve import check_serving
from tests.command import environment
from tests.pico import save_model_folder
from tests.unit.export.test_gguf import TEMPLATE, uneven_folder

HOST = "127.0.0.1"
_SERVING = ("fastapi", "uvicorn", "openai")
needs_serving = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _SERVING), reason="transformers[serving] is not installed"
)
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; nobody changes it."""
    return save_model_folder(tmp_path_factory.mktemp("serve") / "model", head_dim=16, num_attention_heads=4)


@pytest.fixture
def port() -> int:
    """A port that is free."""
    return llama_server._free_port()


def test_a_taken_port_is_refused_by_name(port: int) -> None:
    """Also a host that is not this machine's; a free port is not."""
    require_free_port(HOST, port)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(
            ConfigError, match=rf"nothing can listen on {HOST}:{port} .*Choose another --port or --host"
        ):
            require_free_port(HOST, port)
    with pytest.raises(ConfigError, match=r"nothing can listen on no\.such\.host\.invalid:80 "):
        require_free_port("no.such.host.invalid", 80)


def test_the_program_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's own, which may use a GPU; with every option as it is called there."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = server_command(tmp_path / "m.gguf", "0.0.0.0", 81, context=256, max_new_tokens=7)
    assert command[:3] == [str(program), "--model", str(tmp_path / "m.gguf")]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {"--host": "0.0.0.0", "--port": "81", "--ctx-size": "256", "--n-predict": "7"}


def test_without_its_packages_transformers_server_says_which_to_install(
    folder: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded."""
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(UnavailableError, match=r'Run: pip install "transformers\[serving\]"'):
        check_serving(folder, HOST, port)


def test_a_folder_with_a_name_that_means_something_else_is_refused(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server reads model@revision and model:file."""
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    for name in ("a@b", "a:b.gguf"):
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=r"as a revision or a file. Rename the folder"):
            check_serving(tmp_path / name, HOST, port)


def test_a_file_tells_its_context_and_template(folder: Path, tmp_path: Path) -> None:
    """llama.cpp would make up a template where there is none."""
    assert describe_gguf(export_gguf(folder, tmp_path / "a.gguf").file) == (256, False)
    (tmp_path / "b").mkdir()
    other = save_model_folder(tmp_path / "b" / "model", head_dim=16, num_attention_heads=4)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    assert describe_gguf(export_gguf(other, tmp_path / "b.gguf").file) == (256, True)


@contextmanager
def served(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run ``secateur serve`` in a process of its own for a while."""
    paths = os.pathsep.join([environment()["PYTHONPATH"], *(path for path in sys.path if path)])
    command = [sys.executable, "-m", "secateur.cli.main", "serve", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(PYTHONPATH=paths), stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(port: int, path: str, body: dict[str, Any] | None = None, process: Any = None) -> dict[str, Any]:
    """Return what the server answers, once it is there."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}", json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    for _ in range(600):
        assert process is None or process.poll() is None, process.stderr.read()
        try:
            with urllib.request.urlopen(request) as response:
                data: dict[str, Any] = json.load(response)
                return data
        except OSError as error:
            if getattr(error, "code", 503) != 503:
                raise
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


def converse_with(place: Path, port: int) -> str:
    """Serve a model, ask it once, end it as Ctrl-C does, and return its answer."""
    body = {"model": place.name, "prompt": "The patient", "max_tokens": 4, "temperature": 0.0}
    with served(place, "--port", port) as process:
        ask(port, "/health", process=process)
        text: str = ask(port, "/v1/completions", body)["choices"][0]["text"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    return text


@pytest.mark.slow
@needs_serving
def test_a_model_whose_layers_differ_is_served_by_transformers(tmp_path: Path, port: int) -> None:
    """Under its folder's name; transformers' server would not find its class by itself."""
    assert converse_with(uneven_folder(tmp_path, "llama"), port)


@pytest.mark.slow
@needs_llama_cpp
def test_a_gguf_file_is_served_by_llama_cpp(folder: Path, tmp_path: Path, port: int) -> None:
    """And ends with Ctrl-C, without an error."""
    assert converse_with(export_gguf(folder, tmp_path / "model.gguf").file, port)
