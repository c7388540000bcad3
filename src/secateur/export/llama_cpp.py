"""A GGUF file run in llama.cpp itself and compared with the transformers model: tokens of texts, and next tokens.

Reading a file back proves what was written; only the engine proves that it means the same there. llama.cpp comes as the
package ``xllamacpp``, whose wheels need no compiler. It runs in a process of its own, because it aborts on some files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, LlamaFileType

from secateur.errors import ExportError, UnavailableError
from secateur.export.gguf_tokenizer import missing_bytes, spaces_differ
from secateur.store.checkpoints import load_model, resolve_model
from secateur.store.tokenizers import PROBES, encode, tokenizer_data

TOLERANCES = {"F32": 0.02, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.1}
"""Largest allowed mean difference of log-probabilities (nats); others are coarse and may differ by 1.

F32 is not exact either: llama.cpp looks some activation functions up in tables of half precision.
"""
_COARSE = 1.0
_TOP = 20
_CONTEXT = 256
"""Tokens that llama.cpp makes room for; it takes multiples of this number only."""
_ROOM = 8
"""Tokens of the context that a prompt leaves free."""
_TIME_LIMIT_S = 1800


@dataclass(frozen=True, slots=True)
class Verification:
    """How llama.cpp agreed with transformers.

    Attributes:
        version: of xllamacpp.
        num_texts: texts that both cut into the same tokens.
        num_prompts: prompts after which the next token was compared.
        same_first: prompts after which both find the same token likeliest.
        mean_difference: of the log-probabilities of llama.cpp's likeliest tokens, in nats.
        largest_difference: of those, in nats.
        tolerance: for ``mean_difference``.
    """

    version: str
    num_texts: int
    num_prompts: int
    same_first: int
    mean_difference: float
    largest_difference: float
    tolerance: float


def verify_in_llama_cpp(
    gguf: Path, folder: Path, prompts: Sequence[str], *, threads: int | None = None
) -> Verification:
    """Run a GGUF file in llama.cpp and compare it with the model in ``folder``.

    The prompts and texts of every kind are tokenised by both. After each prompt (its first 248 tokens) the
    log-probabilities of llama.cpp's 20 likeliest next tokens are compared with those of the model in float32.

    Raises:
        UnavailableError: xllamacpp is not installed.
        ExportError: llama.cpp does not load the file, or answers differently.
    """
    from transformers import AutoTokenizer

    from secateur.store.modeling import register_uneven_models

    if importlib.util.find_spec("xllamacpp") is None:
        raise UnavailableError("llama.cpp is not installed. Run: pip install xllamacpp")
    if not prompts:
        raise ExportError("no prompts were given to compare llama.cpp by. Give some text of the domain.")
    register_uneven_models()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [_comparable(text, tokenizer_data(tokenizer)) for text in (*prompts, *PROBES)]
    expected = [encode(tokenizer, text, add_special_tokens=True) for text in texts]
    limit = min(_CONTEXT, _context_of(gguf)) - _ROOM
    inputs = [ids[:limit] for ids in expected[: len(prompts)] if ids]
    plain = encode(tokenizer, "a", add_special_tokens=False)[-1]
    answer = _ask(gguf, texts, inputs, plain, threads or os.cpu_count() or 1)
    _require_same_tokens(texts, expected, answer["tokens"])
    model = load_model(resolve_model(str(folder)), device="cpu", dtype="float32")
    return _compare(gguf, model, inputs, answer)


def _comparable(text: str, data: Mapping[str, Any]) -> str:
    """Return the text without what both are known to read differently, where the tokenizer has such a thing.

    Accents are composed; missing bytes go, and so do special tokens and leading spaces that another space would follow.
    """
    if "NFC" in json.dumps(data["normalizer"]):
        text = unicodedata.normalize("NFC", text)
    if spaces_differ(data):
        for token in data["added_tokens"]:
            text = text.replace(token["content"], "")
        text = text.lstrip(" ")
    missing = missing_bytes(data)
    return "".join(letter for letter in text if missing.isdisjoint(letter.encode("utf-8", "surrogatepass")))


def _ask(gguf: Path, texts: Sequence[str], inputs: Sequence[Sequence[int]], plain: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        request, answer = Path(name) / "request.json", Path(name) / "answer.json"
        data = {
            "file": str(gguf.resolve()),
            "context": _CONTEXT,
            "threads": threads,
            "top": _TOP,
            "answer": plain,
            "texts": list(texts),
            "prompts": [list(ids) for ids in inputs],
        }
        request.write_text(json.dumps(data), encoding="utf-8")
        script = Path(__file__).with_name("llama_cpp_child.py")
        try:
            done = subprocess.run(
                [sys.executable, str(script), str(request), str(answer)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIME_LIMIT_S,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        except subprocess.TimeoutExpired:
            raise ExportError(
                f"llama.cpp did not finish {gguf.name} within {_TIME_LIMIT_S} s; give fewer prompts."
            ) from None
        if done.returncode or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise ExportError(
                f"llama.cpp does not run {gguf.name} (exit status {done.returncode}): {' | '.join(errors[-3:]):.600}"
            )
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result


def _require_same_tokens(
    texts: Sequence[str], expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> None:
    for text, ours, theirs in zip(texts, expected, found, strict=True):
        if list(ours) != list(theirs):
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise ExportError(
                f"llama.cpp cuts {text[:60]!r} into other tokens, from number {place} on: "
                f"{list(theirs[place : place + 5])} instead of {list(ours[place : place + 5])}. "
                "Do not use the file; report this."
            )


def _compare(gguf: Path, model: Any, inputs: Sequence[Sequence[int]], answer: dict[str, Any]) -> Verification:
    differences: list[float] = []
    same = 0
    for ids, likeliest in zip(inputs, answer["next"], strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        same += int(int(log_probs.argmax()) == likeliest[0][0])
        differences += [abs(value - float(log_probs[token])) for token, value in likeliest]
    kind = _stored_as(gguf)
    mean, tolerance = sum(differences) / len(differences), TOLERANCES.get(kind, _COARSE)
    if not mean <= tolerance:
        raise ExportError(
            f"llama.cpp's log-probabilities differ by {mean:.3g} nats on average (at most {max(differences):.3g}), and "
            f"{tolerance} is allowed for {kind}. Do not use the file; report this."
        )
    return Verification(
        version=str(answer["version"]),
        num_texts=len(answer["tokens"]),
        num_prompts=len(inputs),
        same_first=same,
        mean_difference=mean,
        largest_difference=max(differences),
        tolerance=tolerance,
    )


def _context_of(gguf: Path) -> int:
    """Return the context length that the file states."""
    try:
        fields = GGUFReader(gguf).fields
        return int(fields[f"{fields['general.architecture'].contents()}.context_length"].contents())
    except (OSError, ValueError, LookupError) as error:
        raise ExportError(f"{gguf} cannot be read as a GGUF model: {error}. Write it again.") from None


def _stored_as(gguf: Path) -> str:
    """Return the type that the file says its matrices have."""
    field = GGUFReader(gguf).fields.get("general.file_type")
    name = "" if field is None else LlamaFileType(field.contents()).name
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
