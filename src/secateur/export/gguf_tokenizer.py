"""A tokenizer as GGUF metadata; llama.cpp splits text by rules of its own, so only those it has a name for are written.

llama.cpp has two tokenizers that matter here. ``gpt2`` is byte-level BPE; ``tokenizer.ggml.pre`` names one of the
regular expressions compiled into it. ``llama`` is SentencePiece's BPE, which merges by score and knows no merges. The
name is found from the tokenizer's own expressions, never from a hash of what it does to a text, so a tokenizer that was
cut smaller keeps its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from secateur.errors import ExportError
from secateur.export.gguf_architectures import Value

_GPT2 = "ByteLevel"
_DIGIT = r"\p{N}"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's name for what cuts text into words, and whether whole words are looked up before merging."""

_SPACE = "\u2581"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_IN_TEXT = [*range(0xC0), *range(0xC2, 0xF5)]
"""The bytes that UTF-8 can have."""
_UNSUPPORTED = "Use the Hugging Face folder."


@dataclass(frozen=True, slots=True)
class TokenizerLayout:
    """A tokenizer as a GGUF file describes it: metadata by full key, and what the reader of the file should know."""

    metadata: dict[str, Value]
    notes: tuple[str, ...]


def plan_tokenizer(data: Mapping[str, Any], special: Mapping[str, int], rows: int) -> TokenizerLayout:
    """Return the GGUF form of a tokenizer.

    Args:
        data: the plain data of its ``tokenizer.json``.
        special: ids of ``bos``, ``eos``, ``eot``, ``unknown`` and ``padding`` where there are such.
        rows: of the model's embedding; ids without a token get a placeholder.

    Raises:
        ExportError: llama.cpp would cut text differently, or the ids do not fit the model.
    """
    model = data["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"tokenizers of type {model.get('type')} cannot be written as GGUF; known: BPE on bytes (gpt2) and "
            f"SentencePiece's BPE (llama). {_UNSUPPORTED}"
        )
    added = {token["id"]: token for token in data.get("added_tokens", ())}
    tokens = _tokens(model["vocab"], added, rows)
    if model.get("byte_fallback"):
        metadata, notes = _sentencepiece(data, tokens, added), _space_notes(data)
    else:
        metadata, notes = _byte_level(data, tokens, added)
    first, last = _around(data, special)
    metadata |= {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
    metadata |= {f"tokenizer.ggml.{name}_token_id": number for name, number in special.items()}
    return TokenizerLayout(metadata, tuple(notes))


def _tokens(vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], rows: int) -> list[str]:
    """Return every id's text; ids of the embedding that no token has get a placeholder."""
    tokens: list[str | None] = [None] * rows
    texts = [(number, text) for text, number in vocab.items()]
    for number, text in [*texts, *((number, token["content"]) for number, token in added.items())]:
        if number >= rows:
            raise ExportError(
                f"the tokenizer has id {number} ({text!r}) and the model's embedding {rows} rows. Export the model "
                "with its own tokenizer."
            )
        tokens[number] = text
    return [f"[PAD{number}]" if text is None else text for number, text in enumerate(tokens)]


def _types(tokens: Sequence[str], vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]]) -> list[int]:
    types = []
    for number, text in enumerate(tokens):
        if number in added:
            types.append(int(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED))
        else:
            types.append(int(TokenType.NORMAL if text in vocab else TokenType.UNUSED))
    return types


def _byte_level(
    data: Mapping[str, Any], tokens: list[str], added: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[str, Value], list[str]]:
    model = data["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ExportError(f"the tokenizer's {key} is {model[key]!r}, which llama.cpp does not have. {_UNSUPPORTED}")
    splits, whole_words = _splits(data.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    name = _SPLITS.get((splits, whole_words)) if splits is not None else None
    if name is None:
        raise ExportError(
            f"llama.cpp has no name for how this tokenizer cuts text into words (pre_tokenizer "
            f"{data.get('pre_tokenizer')}, ignore_merges {whole_words}); known: {', '.join(_SPLITS.values())}. "
            f"A wrong name would change the tokens without a word. {_UNSUPPORTED}"
        )
    normalizers = _flat(data.get("normalizer"), "normalizers")
    unknown = [item["type"] for item in normalizers if item["type"] != "NFC"]
    if unknown:
        raise ExportError(
            f"the tokenizer normalises text by {', '.join(unknown)}, and llama.cpp does not. {_UNSUPPORTED}"
        )
    notes = []
    if normalizers:
        notes.append("The tokenizer composes accents first (NFC) and llama.cpp does not: give it composed text.")
    missing = missing_bytes(data)
    if missing:
        notes.append(
            f"The tokenizer has no token for {len(missing)} of the bytes that text can have; text that has them may "
            "be cut otherwise in llama.cpp."
        )
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokens, model["vocab"], added),
    }
    if model["merges"]:
        metadata["tokenizer.ggml.merges"] = [" ".join(_pair(merge)) for merge in model["merges"]]
    return metadata, notes


def missing_bytes(data: Mapping[str, Any]) -> set[int]:
    """Return the bytes that a byte-level tokenizer has no token for; transformers drops them before it merges."""
    if data["model"].get("byte_fallback"):
        return set()
    vocab = data["model"]["vocab"]
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return {byte for byte in _IN_TEXT if symbols[byte] not in vocab}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _flat(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [item for member in part[members] for item in _flat(member, members)]
    return [part]


def _splits(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the expressions that cut text, in order; None where a step is of another kind."""
    steps = _flat(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        return None
    found = []
    for step in steps:
        if step["type"] == "ByteLevel":
            if step.get("add_prefix_space"):
                return None
            if step.get("use_regex", True):
                found.append(_GPT2)
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append(_DIGIT)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return tuple(found)


def _sentencepiece(
    data: Mapping[str, Any], tokens: list[str], added: Mapping[int, Mapping[str, Any]]
) -> dict[str, Value]:
    model = data["model"]
    vocab: Mapping[str, int] = model["vocab"]
    missing = sorted(_BYTES - set(vocab))
    if missing or not model.get("unk_token"):
        raise ExportError(
            f"llama.cpp's SentencePiece tokenizer needs all 256 byte tokens and an unknown token; this one lacks "
            f"{', '.join(missing[:3]) or 'the unknown token'}. {_UNSUPPORTED}"
        )
    types = _types(tokens, vocab, added)
    for number, text in enumerate(tokens):
        if text in _BYTES:
            types[number] = int(TokenType.BYTE)
        elif text == model["unk_token"]:
            types[number] = int(TokenType.UNKNOWN)
    scores = _scores(vocab, [_pair(merge) for merge in model["merges"]], {added[number]["content"] for number in added})
    texts = [
        text.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else text
        for text, kind in zip(tokens, types, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [scores.get(text, -float(number)) for number, text in enumerate(tokens)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": _space_prefix(data),
    }


def _scores(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: set[str]) -> dict[str, float]:
    """Return a score for each merged token, higher for what is merged earlier.

    SentencePiece merges any two neighbours that make a token, best score first. That is what the merges do only if each
    way to make a token is one of them, and all ways to make one token stand together.
    """
    scores: dict[str, float] = {}
    last = ""
    for place, (left, right) in enumerate(merges):
        result = left + right
        if result != last and result in scores:
            raise ExportError(
                f"the tokenizer's merges make {result!r} at two ranks, which SentencePiece's scores cannot say. "
                f"{_UNSUPPORTED}"
            )
        scores.setdefault(result, -float(place + 1))
        last = result
    listed = set(merges)
    for text in vocab:
        if text in added or text in _BYTES:
            continue
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise ExportError(
                    f"the tokenizer never merges {pair[0]!r} and {pair[1]!r} and llama.cpp's SentencePiece tokenizer "
                    f"always would. {_UNSUPPORTED}"
                )
    return scores


def _space_prefix(data: Mapping[str, Any]) -> bool:
    """Return whether a text gets a space in front; what else is done to it must be what SentencePiece does."""
    prefix = escaped = False
    for step in _flat(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            escaped = True
        else:
            raise ExportError(f"the tokenizer normalises text by {step}, and llama.cpp does not. {_UNSUPPORTED}")
    for step in _flat(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and not step.get("split", True):
            escaped, prefix = True, step.get("prepend_scheme", "always") != "never"
        elif not (escaped and step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise ExportError(f"the tokenizer cuts text by {step}, and llama.cpp does not. {_UNSUPPORTED}")
    if not escaped:
        raise ExportError(f"the tokenizer does not write spaces as {_SPACE!r}, and llama.cpp would. {_UNSUPPORTED}")
    return prefix


def spaces_differ(data: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer puts its space in front only where there is none, which llama.cpp always does."""
    steps = _flat(data.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)


def _space_notes(data: Mapping[str, Any]) -> list[str]:
    if not spaces_differ(data):
        return []
    return [
        "Where a text begins with a space, and after special tokens inside it, llama.cpp puts one more space in front "
        "than transformers does; SentencePiece itself does as llama.cpp."
    ]


def _around(data: Mapping[str, Any], special: Mapping[str, int]) -> tuple[bool, bool]:
    """Return whether the tokenizer puts the first token before a text, and the last token after it."""
    backend = Tokenizer.from_str(json.dumps(dict(data)))
    plain, whole = (backend.encode("a", add_special_tokens=special_too).ids for special_too in (False, True))
    if whole == plain:
        return False, False
    for first, last in ((True, False), (False, True), (True, True)):
        before = [special.get("bos")] if first else []
        after = [special.get("eos")] if last else []
        if whole == [*before, *plain, *after]:
            return first, last
    raise ExportError(
        f"the tokenizer turns 'a' into ids {whole}; llama.cpp can only put the first token (id {special.get('bos')}) "
        f"before a text and the last (id {special.get('eos')}) after it. {_UNSUPPORTED}"
    )
