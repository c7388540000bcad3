"""Tokenizers in and out: a transformers tokenizer as plain data, a smaller one built from plain data, and the proof.

What stays is decided elsewhere; here it is checked, with the real library, that the smaller tokenizer reads and writes
text as the dense one did.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from secateur.errors import ExportError, TokenizerError
from secateur.store.artifacts import digest
from secateur.vocabulary import rebuild_tokenizer

_CONFIG, _TOKENIZER, _GENERIC_CLASS = "tokenizer_config.json", "tokenizer.json", "PreTrainedTokenizerFast"
_LEFT_BEHIND = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model", "spiece.model")

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs; it costs 42.50 € (or £37)!",
    "  two leading spaces,\ttabs\tand\n\n\nnewlines \r\n end  ",
    "Größe façade Łódź señor naïve Ζεύς и мир שלום السلام عليكم नमस्ते ไทย",
    "漢字とかな 한국어 中文。 👩‍⚕️🧬🫀 a\u0301 \u200b\u00a0\ufeff \x00\x07\x1b\x7f",
    "def f(x):\n    return {'a': [1, 2]}  # https://example.org/?q=1&r=%20 \\alpha_{ij}^2",
)
"""Text of every kind that a tokenizer must get through unchanged."""


def tokenizer_data(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer as the plain data of its ``tokenizer.json``.

    Raises:
        TokenizerError: it has no such form: a slow tokenizer, or one with parts written in Python.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"tokenizer {type(tokenizer).__name__} has no tokenizer.json (it is a slow one), so its vocabulary cannot "
            "be cut. Convert it to a fast tokenizer, or leave vocabulary out of prune."
        )
    try:
        data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library raises a bare Exception for custom parts
        raise TokenizerError(
            f"tokenizer {type(tokenizer).__name__} cannot be written as tokenizer.json: {error}. It has parts written "
            "in Python (a custom pre-tokenizer); leave vocabulary out of prune."
        ) from None
    return {**data, "padding": None, "truncation": None}


def tokenizer_fingerprint(data: Mapping[str, Any]) -> str:
    """Return what identifies a tokenizer by its ``tokenizer.json``."""
    return digest(data)


def smaller_tokenizer(tokenizer: Any, keep: Sequence[int]) -> Any:
    """Return the tokenizer with only the ids in ``keep``, renumbered by their place there; settings stay.

    It has the generic fast class, because a model's own class would build its parts anew instead of reading them.

    Raises:
        TokenizerError: the tokenizer has no plain form, or cannot do without what is to go.
    """
    from transformers import PreTrainedTokenizerFast

    data = rebuild_tokenizer(tokenizer_data(tokenizer), keep)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for stale in _LEFT_BEHIND:
            (folder / stale).unlink(missing_ok=True)
        (folder / _TOKENIZER).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        for key in ("added_tokens_decoder", "auto_map"):
            config.pop(key, None)
        config["tokenizer_class"] = _GENERIC_CLASS
        for key in ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces"):
            config.setdefault(key, getattr(tokenizer, key))
        (folder / _CONFIG).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer into an existing model folder; a generic class is named so that older readers know it."""
    tokenizer.save_pretrained(folder)
    file = folder / _CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = _GENERIC_CLASS
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Return the ids of a text of any length; unlike the tokenizer's own call, no warning about long ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids


def template_texts(tokenizer: Any) -> list[str]:
    """Return what a tokenizer's chat template writes: conversations as rendered, and its literal text."""
    template = tokenizer.chat_template
    if not template:
        return []
    texts = []
    for system, answered, prompt in product((True, False), (True, False), (True, False)):
        messages = [{"role": "system", "content": "a"}] if system else []
        messages += [{"role": "user", "content": "a"}]
        messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}] if answered else []
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except Exception:
            continue
    for source in template.values() if isinstance(template, Mapping) else [template]:
        texts += _literals(source)
    return texts


def _literals(template: str) -> list[str]:
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateError

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return []
    written = [part.data for part in tree.find_all(nodes.TemplateData)]
    quoted = [part.value for part in tree.find_all(nodes.Const) if isinstance(part.value, str)]
    return [text for text in (*written, *quoted) if text]


def token_ids(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Return every id that the tokenizer uses to write the texts, special tokens it adds by itself included."""
    return {token for text in texts for token in encode(tokenizer, text, add_special_tokens=True)}


def term_ids(tokenizer: Any, terms: Sequence[str]) -> tuple[set[int], list[str]]:
    """Return the ids that write the terms, at the start of a text and after a space; and the terms that have none.

    A term has none where the tokenizer cannot write it: reading its ids does not give the term back.
    """
    ids: set[int] = set()
    lost: list[str] = []
    for term in terms:
        written = [encode(tokenizer, text) for text in (term, f" {term}")] if _is_text(term) else [[]]
        if all(_decoded(tokenizer, encoded).strip() == term.strip() for encoded in written):
            ids.update(*written)
        else:
            lost.append(term)
    return ids, lost


def _is_text(term: str) -> bool:
    """Return whether a term says something that UTF-8 can express."""
    return bool(term.strip()) and not any("\ud800" <= character <= "\udfff" for character in term)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def check_smaller_tokenizer(dense: Any, smaller: Any, keep: Sequence[int], texts: Iterable[str]) -> int:
    """Compare the smaller tokenizer with the dense one on real text; return how many texts were segmented alike.

    Every text must come back as the dense tokenizer gives it back, and text whose tokens all stay must have the same
    tokens.

    Raises:
        TokenizerError: it does not; the text is shown.
    """
    position = {token: index for index, token in enumerate(keep)}
    alike = 0
    for text in (*PROBES, *texts):
        before = encode(dense, text)
        after = encode(smaller, text)
        if _decoded(dense, before) != _decoded(smaller, after):
            raise TokenizerError(f"the smaller tokenizer does not give {text[:80]!r} back as the dense one does.")
        if all(token in position for token in before):
            alike += 1
            if [position[token] for token in before] != after:
                raise TokenizerError(f"the smaller tokenizer cuts {text[:80]!r} otherwise, although its tokens stayed.")
    return alike


def compare_reloaded_tokenizer(tokenizer: Any, folder: Path, texts: Iterable[str]) -> None:
    """Reload a saved tokenizer with the Auto class and compare ids and chat template with the one in memory.

    Raises:
        ExportError: it does not load, or differs.
    """
    from transformers import AutoTokenizer

    try:
        reloaded = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ExportError(f"the saved tokenizer does not load again: {error}") from None
    for text in (*PROBES, *texts):
        if encode(reloaded, text, add_special_tokens=True) != encode(tokenizer, text, add_special_tokens=True):
            raise ExportError(f"the reloaded tokenizer gives other ids for {text[:80]!r}; the folder is not kept.")
    if reloaded.chat_template != tokenizer.chat_template:
        raise ExportError("the reloaded tokenizer has another chat template; the folder is not kept.")
