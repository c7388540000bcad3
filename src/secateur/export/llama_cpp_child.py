"""Runs one GGUF file in llama.cpp and writes down what it answered; a script, so that a crash ends only itself.

Usage: python llama_cpp_child.py REQUEST ANSWER, two JSON files. It imports nothing of secateur.
"""

from __future__ import annotations

import importlib
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main(request_file: str, answer_file: str) -> None:
    """Answer a request: the ids of each text, and after each list of ids the likeliest next tokens and a text."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["file"]
    parameters.n_ctx = request["context"]
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    server = xllamacpp.Server(parameters)
    answer = {
        "version": xllamacpp.__version__,
        "tokens": [_tokenize(server.listening_address, text) for text in request["texts"]],
        "next": [_next_tokens(server, ids, request["top"], request["answer"]) for ids in request["prompts"]],
        "text": [_continuation(server, ids, request["continued"]) for ids in request["prompts"]],
    }
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


def _tokenize(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        ids: list[int] = json.load(response)["tokens"]
    return ids


def _next_tokens(server: Any, ids: list[int], top: int, answer: int) -> list[list[float]]:
    """Return the likeliest tokens with their log-probabilities, before any sampling.

    The token sampled is always ``answer``, because nothing is told of an end token or of part of a character.
    """
    result = server.handle_completions(
        {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": top,
            "logit_bias": [[answer, 1e6]],
            "temperature": 0.0,
            "post_sampling_probs": False,
            "cache_prompt": False,
        }
    )
    first = result["choices"][0]["logprobs"]["content"][0]
    return [[entry["id"], entry["logprob"]] for entry in first["top_logprobs"]]


def _continuation(server: Any, ids: list[int], length: int) -> str:
    """Return the text of the likeliest tokens, one after another."""
    result = server.handle_completions({"prompt": ids, "n_predict": length, "temperature": 0.0, "cache_prompt": False})
    return str(result["choices"][0]["text"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
