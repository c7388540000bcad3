"""Serves one GGUF file with xllamacpp's llama.cpp until it is ended; a script, so that a crash ends only itself.

Usage: python llama_server_child.py FILE HOST PORT CONTEXT MAX_NEW_TOKENS; 0 and -1 for the model's own context and no
limit. It imports nothing of secateur.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from typing import Any


def main(file: str, host: str, port: str, context: str, max_new_tokens: str) -> None:
    """Serve until a signal comes."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    xllamacpp: Any = importlib.import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.hostnames = [host]
    parameters.port = int(port)
    parameters.n_ctx = int(context)
    parameters.n_predict = int(max_new_tokens)
    parameters.n_parallel = 1
    server = xllamacpp.Server(parameters)
    ended.wait()
    del server


if __name__ == "__main__":
    main(*sys.argv[1:])
