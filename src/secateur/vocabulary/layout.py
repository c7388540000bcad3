"""What stands where in a tokenizer.json, checked while it is read; it does not know what the tokens are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from secateur.errors import TokenizerError

ADVICE = "Leave `vocabulary` out of prune.units."


def model_of(data: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the type of the model in a tokenizer.json, "BPE" or "Unigram", and the model.

    Raises:
        TokenizerError: there is none, or it is of a kind that cannot be cut.
    """
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise TokenizerError(f"tokenizer.json has model = {model!r:.40}; it must be an object. {ADVICE}")
    # Old files name no type.
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if "unk_id" in model else None)
    if kind not in ("BPE", "Unigram"):
        raise TokenizerError(f"a tokenizer of type {kind} cannot be cut; only BPE and Unigram ones can. {ADVICE}")
    if kind == "BPE":
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise TokenizerError(
                    f"a BPE tokenizer with {option} = {model[option]!r} cannot be cut: its tokens do not follow "
                    f"from their characters alone. {ADVICE}"
                )
    return kind, model


def token_ids(kind: str, model: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the model's own tokens by string, which leaves out tokens that were only added.

    Raises:
        TokenizerError: the vocabulary is missing, malformed, or ambiguous.
    """
    vocab = model.get("vocab")
    if kind == "Unigram":
        try:
            listed = {piece: id for id, (piece, score) in enumerate(vocab or ()) if score <= 0 or score > 0}
        except (TypeError, ValueError):
            listed = {}
        if not isinstance(vocab, Sequence) or not listed or len(listed) < len(vocab):
            raise TokenizerError(
                "model.vocab of a Unigram tokenizer.json must list tokens with their scores, each token once, "
                f"not {vocab!r:.40}. {ADVICE}"
            )
        return listed
    if not isinstance(vocab, Mapping) or not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise TokenizerError(f"model.vocab of a BPE tokenizer.json must map tokens to ids, not {vocab!r:.40}. {ADVICE}")
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"model.vocab of tokenizer.json gives several tokens the same id. {ADVICE}")
    return dict(vocab)


def unknown_id(kind: str, model: Mapping[str, Any], symbols: Mapping[str, int]) -> int | None:
    """Return the id of the unknown token, or None where there is none.

    Raises:
        TokenizerError: the id is no token's.
    """
    if kind == "BPE":
        return symbols.get(model.get("unk_token") or "")
    unknown = model.get("unk_id")
    if unknown is None or (is_id(unknown) and unknown < len(symbols)):
        return unknown
    raise TokenizerError(f"tokenizer.json has unk_id = {unknown!r}, which is no token of its list. {ADVICE}")


def added_ids(data: Mapping[str, Any], symbols: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of added tokens by string, which must be the ids that loading the file gives them.

    The library does not read the ids in the file: a token that the model has takes its id there, and any other comes
    after the model's tokens or, once that is higher, after the added token with the highest id.

    Args:
        data: a tokenizer.json.
        symbols: ids of the model's tokens by string.

    Raises:
        TokenizerError: an entry is malformed, or loading would give it another id.
    """
    ids: dict[str, int] = {}
    highest = -1
    for entry in data.get("added_tokens") or []:
        content, written = (entry.get("content"), entry.get("id")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(content, str) or not is_id(written):
            raise TokenizerError(f"tokenizer.json has an added token without content or id: {entry!r:.60}. {ADVICE}")
        loaded = ids.get(content, symbols.get(content, max(highest + 1, len(symbols))))
        if loaded != written:
            raise TokenizerError(
                f"added token {content!r} has id {written} in tokenizer.json, but loads with id {loaded}: the ids "
                f"before it have a gap, or the model has the token under that id. {ADVICE}"
            )
        ids[content] = loaded
        highest = max(highest, loaded)
    return ids


def merge_pairs(model: Mapping[str, Any], symbols: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the two strings of every merge of a BPE model; a merge is "a b" or ["a", "b"].

    Raises:
        TokenizerError: a merge is neither, or one of its tokens or their join is not in the vocabulary.
    """
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"tokenizer.json has a BPE model without a list of merges: {merges!r:.40}. {ADVICE}")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, Sequence) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise TokenizerError(f"tokenizer.json has the merge {merge!r:.40}, which is not two tokens. {ADVICE}")
        left, right = parts
        if not (left in symbols and right in symbols and left + right in symbols):
            raise TokenizerError(
                f"tokenizer.json merges {left!r} and {right!r}, but model.vocab lacks one of them or their join. "
                f"{ADVICE}"
            )
        yield left, right


def processors(processor: Any) -> Iterator[Any]:
    """Yield a post-processor that is not a sequence, or those inside one, one by one.

    Raises:
        TokenizerError: one is of unknown type or malformed.
    """
    if processor is None:
        return
    kind = processor.get("type") if isinstance(processor, Mapping) else None
    if kind == "Sequence":
        for inner in processor.get("processors") or []:
            yield from processors(inner)
        return
    if kind == "TemplateProcessing":
        specials = processor.get("special_tokens")
        fits = isinstance(specials, Mapping) and all(
            isinstance(special, Mapping) and isinstance(special.get("ids"), list) for special in specials.values()
        )
    elif kind in ("RobertaProcessing", "BertProcessing"):
        ends = [processor.get(end) for end in ("sep", "cls")]
        fits = all(isinstance(end, Sequence) and len(end) == 2 and is_id(end[1]) for end in ends)
    else:
        fits = kind == "ByteLevel"
    if not fits:
        raise TokenizerError(
            f"tokenizer.json has a post-processor of type {kind!r} whose token ids we cannot renumber: "
            f"{processor!r:.60}. {ADVICE}"
        )
    yield processor


def named_ids(data: Mapping[str, Any]) -> set[int]:
    """Return the ids that the post-processor and the padding of a tokenizer.json name.

    Raises:
        TokenizerError: a post-processor is of unknown type or malformed.
    """
    ids: set[int] = set()
    for processor in processors(data.get("post_processor")):
        for special in (processor.get("special_tokens") or {}).values():
            ids.update(special["ids"])
        ids.update(processor[end][1] for end in ("sep", "cls") if end in processor)
    padding = data.get("padding")
    if isinstance(padding, Mapping) and is_id(padding.get("pad_id")):
        ids.add(padding["pad_id"])
    return ids


def is_id(value: Any) -> bool:
    """Return whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
