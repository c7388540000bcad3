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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType, quants
from numpy.typing import NDArray

from secateur.errors import ExportError, UnavailableError, VerificationError
from secateur.export import ggml
from secateur.export.gguf_architectures import plan_layout
from secateur.export.gguf_tokenizer import missing_bytes, spaces_differ
from secateur.export.gguf_types import PLAIN, pack
from secateur.export.stored import load_config, open_parameters
from secateur.store.checkpoints import load_model, resolve_model
from secateur.store.tokenizers import PROBES, encode, tokenizer_data

TOLERANCE = 0.02
"""Largest allowed mean difference of log-probabilities (nats), beside what rounding the weights explains.

F32 is not exact either: llama.cpp looks some activation functions up in tables of half precision.
"""
ROUNDING_FACTOR = 3.0
"""How many times what rounding the weights does to this very model, in transformers, may be added: llama.cpp rounds
what enters a product as well, in blocks of the same size. On a real 135M model in Q8_0 all of it came to 0.095 nats and
the weights' part to 0.057; wrongly placed weights give whole nats."""
PROMPTS = (
    "The patient was admitted to hospital with",
    "Question: What are the symptoms of iron deficiency?\nAnswer:",
    "In 1969 the first people to walk on the Moon",
    "The contract shall be governed by the laws of",
    "def mean(values):\n    return",
    "The largest river of the continent flows through",
)
"""What the comparison reads where no prompts are given."""
_TOP = 20
_ANSWERED = 8
"""Prompts that are answered; of all others only the tokens are compared."""
_CONTINUED = 16
_CONTEXT = 256
"""Tokens that llama.cpp makes room for; it takes multiples of this number only."""
_ROOM = 24
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
        same_text: prompts that both continue with the same 16 tokens, taking the likeliest each time. Rounding alone
            can turn such a text where two tokens are nearly as likely, so nothing fails by it.
        mean_difference: of the log-probabilities of llama.cpp's likeliest tokens, in nats.
        largest_difference: of those, in nats.
        rounding: the part of it that rounding the weights alone makes, measured in transformers.
        tolerance: for ``mean_difference``.
    """

    version: str
    num_texts: int
    num_prompts: int
    same_first: int
    same_text: int
    mean_difference: float
    largest_difference: float
    rounding: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"run in llama.cpp (xllamacpp {self.version}): {self.num_texts:,} texts cut into the same tokens, "
            f"{self.same_first} of {self.num_prompts} prompts have the same likeliest next token and {self.same_text} "
            f"go on with the same {_CONTINUED}, log-probabilities differ by {self.mean_difference:.4f} nats on average "
            f"(allowed: {self.tolerance:.3g})"
        )


def is_installed() -> bool:
    """Return whether llama.cpp can be asked here."""
    return importlib.util.find_spec("xllamacpp") is not None


def verify_in_llama_cpp(
    gguf: Path, folder: Path, prompts: Sequence[str], *, threads: int | None = None
) -> Verification:
    """Run a GGUF file in llama.cpp and compare it with the model in ``folder``.

    The prompts and texts of every kind are tokenised by both. After each of the first eight prompts (its first 232
    tokens) the
    log-probabilities of llama.cpp's 20 likeliest next tokens are compared with those of the model in float32. They may
    differ by ``TOLERANCE`` and ``ROUNDING_FACTOR`` times what rounding the weights as the file does changes in them.

    Raises:
        UnavailableError: xllamacpp is not installed.
        ExportError: there are no prompts, or the file cannot be read.
        VerificationError: llama.cpp does not load the file, or answers differently.
    """
    from transformers import AutoTokenizer

    from secateur.store.modeling import register_uneven_models

    if not is_installed():
        raise UnavailableError("llama.cpp is not installed. Run: pip install xllamacpp")
    if not prompts:
        raise ExportError("no prompts were given to compare llama.cpp by. Give some text of the domain.")
    register_uneven_models()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = _comparable((*prompts, *PROBES), tokenizer_data(tokenizer))
    expected = [encode(tokenizer, text, add_special_tokens=True) for text in texts]
    limit = min(_CONTEXT, _context_of(gguf)) - _ROOM
    inputs = [ids[:limit] for ids in expected[: min(len(prompts), _ANSWERED)] if ids]
    plain = encode(tokenizer, "a", add_special_tokens=False)[-1]
    answer = _ask(gguf, texts, inputs, plain, threads or os.cpu_count() or 1)
    _require_same_tokens(texts, expected, answer["tokens"])
    model = load_model(resolve_model(str(folder)), device="cpu", dtype="float32")
    return _compare(gguf, folder, model, tokenizer, inputs, answer)


def _comparable(texts: Iterable[str], data: Mapping[str, Any]) -> list[str]:
    """Return texts without what both are known to read differently, where the tokenizer has such a thing.

    Accents are composed; missing bytes go, and so do special tokens and leading spaces that another space would follow.
    """
    composes, spaced, missing = "NFC" in json.dumps(data["normalizer"]), spaces_differ(data), missing_bytes(data)
    result = []
    for text in texts:
        if composes:
            text = unicodedata.normalize("NFC", text)
        if spaced:
            for token in data["added_tokens"]:
                text = text.replace(token["content"], "")
            text = text.lstrip(" ")
        letters = (letter for letter in text if missing.isdisjoint(letter.encode("utf-8", "surrogatepass")))
        result.append("".join(letters))
    return result


def _ask(gguf: Path, texts: Sequence[str], inputs: Sequence[Sequence[int]], plain: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        request, answer = Path(name) / "request.json", Path(name) / "answer.json"
        data = {
            "file": str(gguf.resolve()),
            "context": _CONTEXT,
            "threads": threads,
            "top": _TOP,
            "continued": _CONTINUED,
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
            raise VerificationError(
                f"llama.cpp did not finish the file within {_TIME_LIMIT_S} s; give fewer prompts."
            ) from None
        if done.returncode or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise VerificationError(
                f"llama.cpp does not run the file (exit status {done.returncode}): {' | '.join(errors[-3:]):.600}"
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
            raise VerificationError(
                f"llama.cpp cuts {text[:60]!r} into other tokens, from number {place} on: "
                f"{list(theirs[place : place + 5])} instead of {list(ours[place : place + 5])}. "
                "Do not use the file; report this."
            )


def _compare(
    gguf: Path, folder: Path, model: Any, tokenizer: Any, inputs: Sequence[Sequence[int]], answer: dict[str, Any]
) -> Verification:
    likeliest = [[token for token, _ in found] for found in answer["next"]]
    exact = [_log_probs(model, ids) for ids in inputs]
    same = sum(int(int(ours.argmax()) == tokens[0]) for ours, tokens in zip(exact, likeliest, strict=True))
    theirs = torch.tensor([value for found in answer["next"] for _, value in found], dtype=torch.float64)
    ours = _at(exact, likeliest)
    differences, kind = (theirs - ours).abs(), _stored_as(gguf)
    continued = [_continuation(model, tokenizer, ids) for ids in inputs]
    same_text = sum(map(_is_same_text, continued, answer["text"]))
    _round_weights(model, gguf, folder)
    rounding = float((_at([_log_probs(model, ids) for ids in inputs], likeliest) - ours).abs().mean())
    mean, tolerance = float(differences.mean()), TOLERANCE + ROUNDING_FACTOR * rounding
    if not mean <= tolerance:
        raise VerificationError(
            f"llama.cpp's log-probabilities differ by {mean:.3g} nats on average (at most {differences.max():.3g}), "
            f"and {tolerance:.3g} is allowed for {kind}: {TOLERANCE:g} and {ROUNDING_FACTOR:g} times what rounding the "
            "weights does. Do not use the file; report this."
        )
    return Verification(
        version=str(answer["version"]),
        num_texts=len(answer["tokens"]),
        num_prompts=len(inputs),
        same_first=same,
        same_text=same_text,
        mean_difference=mean,
        largest_difference=float(differences.max()),
        rounding=rounding,
        tolerance=tolerance,
    )


def _log_probs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of the token after a prompt."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1)


def _continuation(model: Any, tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of the likeliest tokens after a prompt, one after another."""
    from transformers import GenerationConfig

    inputs = torch.tensor([list(ids)])
    with torch.inference_mode():
        found = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=GenerationConfig(max_new_tokens=_CONTINUED, do_sample=False, pad_token_id=0),
        )
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _is_same_text(ours: str, theirs: str) -> bool:
    """Return whether two texts agree as far as both go: one may have ended, or end in part of a character."""
    first, second = (text.rstrip("\ufffd").strip() for text in (ours, theirs))
    return first.startswith(second) or second.startswith(first)


def _at(log_probs: Sequence[torch.Tensor], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the log-probabilities of some tokens after each prompt, one after another."""
    return torch.cat([values[list(wanted)] for values, wanted in zip(log_probs, tokens, strict=True)])


def _round_weights(model: Any, gguf: Path, folder: Path) -> None:
    """Round a model's matrices, each in the type that the file keeps it in."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    sizes: Counter[GGMLQuantizationType] = Counter()
    for tensor in matrices:
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    most = sizes.most_common(1)[0][0]
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    outer = {
        id(model.get_input_embeddings().weight): tensors["token_embd.weight"].tensor_type,
        id(model.get_output_embeddings().weight): head.tensor_type,
    }
    sources = _sources(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2:
                continue
            stored, transposed = sources.get(name, ("", False))
            kind = tensors[stored].tensor_type if stored in tensors else outer.get(id(parameter), most)
            values = parameter.numpy().T if transposed else parameter.numpy()
            rounded = _rounded(values, kind)
            parameter.copy_(torch.from_numpy(rounded.T if transposed else rounded))


def _sources(folder: Path) -> dict[str, tuple[str, bool]]:
    """Return which tensor of a file each parameter of a folder goes into, and whether transposed.

    Nothing is known of a model that llama.cpp takes only after it was filled up.
    """
    with open_parameters(folder) as parameters:
        try:
            layout = plan_layout(load_config(folder), parameters.shapes)
        except ExportError:
            return {}
    return {name: (tensor.name, tensor.transposed) for tensor in layout.tensors for name in tensor.parameters}


def _rounded(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Return rows as they read back from a type, filled up to whole blocks for that.

    Types that only llama.cpp's own tools write are taken for Q4_0.
    """
    if kind not in ggml.KINDS and kind.name not in PLAIN:
        kind = GGMLQuantizationType.Q4_0
    columns, block = values.shape[1], int(GGML_QUANT_SIZES[kind][0])
    whole = np.pad(values, ((0, 0), (0, -columns % block)))
    found: NDArray[np.float32] = quants.dequantize(pack(whole, kind), kind)
    return found[:, :columns]


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
