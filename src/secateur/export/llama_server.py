"""llama.cpp's own server, from whichever of its packages is installed: its program on PATH, or the one in xllamacpp."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from secateur.errors import ConfigError, ExportError, UnavailableError

_PROGRAM = "llama-server"
_START_LIMIT_S = 600
_POLL_S = 0.1
_MODEL_CONTEXT, _NO_LIMIT = 0, -1
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def server_command(
    gguf: Path, host: str, port: int, *, context: int = _MODEL_CONTEXT, max_new_tokens: int = _NO_LIMIT
) -> list[str]:
    """Return the command that serves a GGUF file.

    Args:
        gguf: the file.
        host: to listen on.
        port: to listen on.
        context: tokens of a conversation; 0 for as many as the model was made for.
        max_new_tokens: of an answer whose request sets no limit; -1 for none.

    Raises:
        UnavailableError: there is no llama.cpp.
    """
    file = str(gguf.resolve())
    if program := shutil.which(_PROGRAM):
        options = ["--ctx-size", str(context), "--n-predict", str(max_new_tokens)]
        return [program, "--model", file, "--host", host, "--port", str(port), *options]
    if importlib.util.find_spec("xllamacpp") is not None:
        script = str(Path(__file__).with_name("llama_server_child.py"))
        return [sys.executable, script, file, host, str(port), str(context), str(max_new_tokens)]
    raise UnavailableError(
        f"llama.cpp is not installed: there is no {_PROGRAM} on PATH, and no xllamacpp. Run: pip install xllamacpp"
    )


def server_environment() -> dict[str, str]:
    """Return the environment for ``server_command``, in which Python finds the same packages as here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@contextmanager
def running_server(gguf: Path, *, context: int = _MODEL_CONTEXT) -> Iterator[str]:
    """Serve a GGUF file on a free port of this machine and give the address, once it answers.

    Raises:
        UnavailableError: there is no llama.cpp.
        ExportError: llama.cpp does not load the file.
    """
    port = _free_port()
    command = server_command(gguf, "127.0.0.1", port, context=context)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=server_environment(),
            start_new_session=True,  # so that Ctrl-C reaches us first
        )
        try:
            address = f"http://127.0.0.1:{port}"
            if not _answers(address, process):
                log.seek(0)
                lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
                told = [line for line in lines if "error" in line.lower()] or lines
                raise ExportError(f"llama.cpp does not load {gguf.name}: {' | '.join(told[-3:]):.600}")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server is ready; return whether it is, and false where it ended or took too long."""
    deadline = time.monotonic() + _START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with _OPENER.open(f"{address}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):  # not listening yet, or still loading
            time.sleep(_POLL_S)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free_port(host: str, port: int) -> None:
    """Refuse an address that nobody can listen on.

    Raises:
        ConfigError: the port is taken, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"nothing can listen on {host}:{port} ({error.strerror or error}). Choose another --port or --host."
        ) from None


def describe_gguf(gguf: Path) -> tuple[int, bool]:
    """Return a file's context length, and whether it holds a chat template; llama.cpp would make one up if not.

    Raises:
        ExportError: the file is broken.
    """
    try:
        fields = GGUFReader(gguf).fields
        context = fields[f"{fields['general.architecture'].contents()}.context_length"].contents()
        return int(context), "tokenizer.chat_template" in fields
    except (OSError, ValueError, LookupError) as error:
        raise ExportError(f"{gguf} cannot be read as a GGUF model: {error}. Write it again.") from None


def stream_events(address: str, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ask the server and yield what it streams, piece by piece.

    Raises:
        ExportError: the server refuses; its reason is the message.
    """
    request = urllib.request.Request(
        f"{address}{path}", json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _OPENER.open(request) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data.startswith("{"):
                    event = json.loads(data)
                    if "error" in event:
                        raise ExportError(f"llama.cpp stopped: {event['error'].get('message', event['error'])}")
                    yield event
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        raise ExportError(f"llama.cpp refuses: {_message(reason)}") from None
    except urllib.error.URLError as error:
        raise ExportError(f"llama.cpp went away: {error.reason}. Start again.") from None


def _message(reason: str) -> str:
    try:
        return str(json.loads(reason)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return reason[:200]
