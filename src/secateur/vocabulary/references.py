"""Token ids in a model's config.json and generation_config.json: which must stay, and what they become.

It does not read or write those files, and knows no token by its string.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from secateur.errors import TokenizerError
from secateur.vocabulary.layout import is_id
from secateur.vocabulary.rebuild import places_of

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
"""Lists of ids, or of sequences of ids; what holds a removed token goes."""


def referenced_ids(config: Mapping[str, Any]) -> set[int]:
    """Return the token ids that a configuration names and that must stay; nested parts included.

    Ids of suppressed or biased tokens are not among them: what is gone cannot be generated. An id may lie outside the
    vocabulary, where the configuration is wrong.
    """
    return {id for _, ids in _named_ids(config) for id in ids}


def renumber(config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Return a copy of a configuration with its token ids and ``vocab_size`` as after cutting the vocabulary.

    Args:
        config: a config.json or generation_config.json as plain data; nested parts are renumbered too.
        keep: old ids, ascending; a token's new id is its place here.

    Raises:
        TokenizerError: ``keep`` is not ascending, or an id that must stay is not in it.
    """
    places = places_of(keep)
    for key, ids in _named_ids(config):
        for id in ids:
            if id not in places:
                raise TokenizerError(
                    f"the configuration has {key} = {id}, which is not among the {len(keep)} kept tokens. "
                    "Keep it, or correct the key if the tokenizer has no such token."
                )
    return _renumbered(config, places)


def _named_ids(config: Mapping[Any, Any]) -> Iterator[tuple[str, list[int]]]:
    """Yield every key that names ids which must stay, with those ids."""
    for key, value in config.items():
        if _names_tokens(key):
            yield key, [id for id in (value if _is_list(value) else [value]) if is_id(id)]
        elif key == "forced_decoder_ids" and _is_list(value):
            yield key, [id for pair in value if _is_list(pair) for id in pair[1:] if is_id(id)]
        else:
            for part in value if _is_list(value) else [value]:
                if isinstance(part, Mapping):
                    yield from _named_ids(part)


def _renumbered(config: Mapping[Any, Any], places: Mapping[int, int]) -> dict[Any, Any]:
    return {key: _value(key, value, places) for key, value in config.items()}


def _value(key: Any, value: Any, places: Mapping[int, int]) -> Any:
    if key == "vocab_size" and is_id(value):
        return len(places)
    if _names_tokens(key):
        return _moved(value, places)
    if key in _LISTS and _is_list(value):
        return _kept(value, places)
    if key == "forced_decoder_ids" and _is_list(value):
        return [[*pair[:1], *_moved(pair[1:], places)] if _is_list(pair) else pair for pair in value]
    if key == "sequence_bias":
        return _biases(value, places)
    if isinstance(value, Mapping):
        return _renumbered(value, places)
    if _is_list(value):
        return [_renumbered(part, places) if isinstance(part, Mapping) else part for part in value]
    return value


def _kept(ids: Sequence[Any], places: Mapping[int, int]) -> list[Any]:
    """Return a list without the ids that go, and without the lists in it that held one or are left empty."""
    kept = []
    for id in ids:
        if not _is_list(id):
            kept += [_moved(id, places)] if _stays(id, places) else []
        elif any(_is_list(inner) for inner in id):
            kept += [alternatives] if (alternatives := _kept(id, places)) else []
        elif all(_stays(inner, places) for inner in id):
            kept.append(_moved(id, places))
    return kept


def _biases(biases: Any, places: Mapping[int, int]) -> Any:
    if isinstance(biases, Mapping):
        kept = {ids: bias for ids, bias in biases.items() if all(_stays(id, places) for id in ids)}
        return {tuple(_moved(ids, places)): bias for ids, bias in kept.items()}
    if not _is_list(biases):
        return biases
    return [[_moved(ids, places), bias] for ids, bias in biases if all(_stays(id, places) for id in ids)]


def _moved(value: Any, places: Mapping[int, int]) -> Any:
    if _is_list(value):
        return [_moved(id, places) for id in value]
    return places[value] if is_id(value) else value


def _stays(id: Any, places: Mapping[int, int]) -> bool:
    return not is_id(id) or id in places


def _names_tokens(key: Any) -> bool:
    return isinstance(key, str) and key.endswith(("_token_id", "_token_ids", "_token_index"))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
