"""A tokenizer.json with fewer tokens, which segments every text whose tokens all stay as before; it reads no files.

Ids outside the tokenizer are another matter: those are in ``references``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.errors import TokenizerError
from secateur.vocabulary.anatomy import TokenGraph, read_tokenizer
from secateur.vocabulary.layout import added_ids, merge_pairs, named_ids, processors


def rebuild_tokenizer(data: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Return a tokenizer.json that has only the kept tokens, renumbered; the given one is not changed.

    Args:
        data: the parsed tokenizer.json.
        keep: old ids, ascending; a token's new id is its place here. Ids that no token has, as padded embedding rows,
            stay ids without a token.

    Raises:
        TokenizerError: the tokenizer cannot be cut, or ``keep`` is not ascending or lacks a token that must stay.
    """
    graph = read_tokenizer(data)
    places = places_of(keep)
    _check_kept(graph, places, named_ids(data))
    symbols = {piece: places[id] for piece, id in graph.symbols.items() if id in places}
    rebuilt = {
        key: _model(value, graph.kind, symbols, places) if key == "model" else copy.deepcopy(value)
        for key, value in data.items()
    }
    for token in rebuilt.get("added_tokens") or []:
        token["id"] = places[token["id"]]
    for processor in processors(rebuilt.get("post_processor")):
        _renumber_processor(processor, places)
    padding = rebuilt.get("padding") or {}
    if padding.get("pad_id") is not None:
        padding["pad_id"] = places[padding["pad_id"]]
    added_ids(rebuilt, symbols)
    return rebuilt


def places_of(keep: Sequence[int]) -> dict[int, int]:
    """Return the new id of every kept old id.

    Raises:
        TokenizerError: the ids are not ascending, or one is negative or twice there.
    """
    last = -1
    for id in keep:
        if id <= last:
            raise TokenizerError(f"kept token ids must ascend from 0 on, but {id} comes after {last}; sort them.")
        last = id
    return {id: place for place, id in enumerate(keep)}


def _check_kept(graph: TokenGraph, places: Mapping[int, int], named: set[int]) -> None:
    for what, ids in (
        ("added tokens", graph.added),
        ("tokens that no smaller ones can spell", graph.alphabet - graph.characters),
        ("ids that the post-processor or the padding names", named),
    ):
        missing = sorted(id for id in ids if id not in places)
        if missing:
            names = ", ".join(f"{graph.pieces.get(id, 'no token')!r} (id {id})" for id in missing[:3])
            raise TokenizerError(f"{len(missing)} {what} would go: {names}. Keep them.")
    if all(token in places for token in graph.closed(places)):
        return
    broken = {id: lost for id in places if (lost := sorted(graph.needs(id) - places.keys()))}
    names = "; ".join(
        f"{graph.piece(id)!r} (id {id}) lacks {', '.join(repr(graph.piece(token)) for token in broken[id])}"
        for id in list(broken)[:3]
    )
    raise TokenizerError(
        f"{len(broken)} kept tokens are made of tokens that would go: {names}. Keep these too (`TokenGraph.closed`)."
    )


def _model(model: Mapping[str, Any], kind: str, symbols: Mapping[str, int], places: Mapping[int, int]) -> Any:
    rebuilt = dict(model)
    if kind == "Unigram":
        rebuilt["vocab"] = [copy.copy(entry) for id, entry in enumerate(model["vocab"]) if id in places]
        if model.get("unk_id") is not None:
            rebuilt["unk_id"] = places[model["unk_id"]]
        return rebuilt
    rebuilt["vocab"] = dict(sorted(symbols.items(), key=lambda entry: entry[1]))
    pairs = zip(model["merges"], merge_pairs(model, model["vocab"]), strict=True)
    rebuilt["merges"] = [
        copy.copy(merge)
        for merge, (left, right) in pairs
        if left in symbols and right in symbols and left + right in symbols
    ]
    return rebuilt


def _renumber_processor(processor: Any, places: Mapping[int, int]) -> None:
    """Renumber the ids in one post-processor, in place."""
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [places[id] for id in special["ids"]]
    for end in ("sep", "cls"):
        if end in processor:
            token, id = processor[end]
            processor[end] = [token, places[id]]
