"""How the tokens of a tokenizer.json are made of each other; not for segmenting text, which the real library does.

The closure is exact. In a run of BPE no merge crosses the edge of a token of the result, so inside each such token the
run is that token's own derivation. Where the derivations of all kept tokens stay, with their merges in the old order,
every step of the old run is still there and still comes first, and nothing new can merge: a text whose tokens all
stay is segmented as before. Unigram needs no closure: the best path through all tokens stays the best through fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from secateur.errors import TokenizerError
from secateur.vocabulary.layout import ADVICE, added_ids, merge_pairs, model_of, named_ids, token_ids, unknown_id

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TokenGraph:
    """The tokens of one tokenizer and what they are made of; build it with ``read_tokenizer``.

    Attributes:
        kind: "byte-level BPE", "BPE with byte fallback", "BPE" or "Unigram".
        num_ids: the highest token id plus one.
        added: ids of all added tokens, special or not.
        alphabet: ids that no smaller pieces can stand for: single characters, byte tokens, the unknown token, and
            what the post-processor and the padding name.
        characters: those single characters of the alphabet that byte fallback can spell; they may be given up.
        pieces: the string of every token by id.
        symbols: ids of the model's own tokens by string, which leaves out tokens that were only added.
        merges: for each pair of ids that merges, its rank (lower is earlier) and the resulting id.
        byte_level: whether the strings are bytes written as visible characters.
        byte_fallback: whether unknown characters are spelt with tokens such as <0x0A>.
        halves: cache of the last merge of each token met so far; None where merging never makes the token.
    """

    kind: str
    num_ids: int
    added: frozenset[int]
    alphabet: frozenset[int]
    characters: frozenset[int]
    pieces: Mapping[int, str]
    symbols: Mapping[str, int]
    merges: Mapping[tuple[int, int], tuple[int, int]]
    byte_level: bool
    byte_fallback: bool
    halves: dict[int, tuple[int, int] | None] = field(default_factory=dict)

    def piece(self, token: int) -> str:
        """Return a token's string as the vocabulary writes it.

        Raises:
            TokenizerError: no token has this id, as with padded embedding rows.
        """
        if token not in self.pieces:
            raise TokenizerError(f"no token has id {token}; its ids end at {self.num_ids - 1}.")
        return self.pieces[token]

    def text(self, token: int) -> str | None:
        """Return the text a token stands for, or None where it is not whole characters, or no token."""
        piece = self.pieces.get(token)
        if piece is None or token in self.added:
            return piece
        if self.byte_level:
            # A piece with a character that writes no byte is taken as it stands, as the library's decoder does.
            codes = [_BYTE_OF_SYMBOL.get(symbol, -1) for symbol in piece]
            return piece if -1 in codes else _decoded(bytes(codes))
        byte = _BYTE_TOKEN.fullmatch(piece) if self.byte_fallback else None
        return _decoded(bytes.fromhex(byte[1])) if byte else piece.replace(_SPACE, " ")

    def needs(self, token: int) -> frozenset[int]:
        """Return the ids on a token's own derivation, without itself; empty for Unigram and for single symbols.

        A token that merging never makes needs nothing: only ``ignore_merges`` can produce it. An added token that the
        model has too may need something, where merging makes it.
        """
        return self.closed([token]) - {token}

    def closed(self, tokens: Iterable[int]) -> frozenset[int]:
        """Return the tokens with everything they need; close a set as a whole, alphabet and added tokens included."""
        closure: set[int] = set()
        pending = list(tokens)
        while pending:
            token = pending.pop()
            if token not in closure:
                closure.add(token)
                if self.merges and token not in self.halves:
                    self._derive(token)
                pending.extend(self.halves.get(token) or ())
        return frozenset(closure)

    def is_reachable(self, token: int) -> bool:
        """Return whether merging makes the token of its own characters; for Unigram, whether the model has it."""
        piece = self.pieces.get(token, "")
        if self.symbols.get(piece) != token:
            return False
        return self.kind == "Unigram" or len(piece) == 1 or bool(self.needs(token))

    def _derive(self, token: int) -> None:
        """Fill the cache for a token, and for all tokens met on the way: their derivations are parts of this one."""
        symbols = [self.symbols.get(symbol, -1) for symbol in self.pieces.get(token, "")]
        while -1 not in symbols:
            best, place = None, 0
            for index, pair in enumerate(pairwise(symbols)):
                merge = self.merges.get(pair)
                if merge is not None and (best is None or merge < best):
                    best, place = merge, index
            if best is None:
                break
            self.halves[best[1]] = (symbols[place], symbols[place + 1])
            symbols[place : place + 2] = [best[1]]
        self.halves.setdefault(token, None)


def read_tokenizer(data: Mapping[str, Any]) -> TokenGraph:
    """Return the token graph of a tokenizer.json.

    Args:
        data: the parsed file.

    Raises:
        TokenizerError: the file is malformed, or its model is of a kind that cannot be cut.
    """
    kind, model = model_of(data)
    symbols = token_ids(kind, model)
    added = added_ids(data, symbols)
    pieces = {id: piece for piece, id in (symbols | added).items()}
    byte_level = any(_has_type(data.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer", "decoder"))
    byte_tokens = {id for piece, id in symbols.items() if _BYTE_TOKEN.fullmatch(piece)}
    if not model.get("byte_fallback"):
        byte_tokens.clear()
    unknown = unknown_id(kind, model, symbols)
    textless = byte_tokens if unknown is None else byte_tokens | {unknown}
    fixed = textless | {id for id in named_ids(data) if id in pieces}
    if kind == "Unigram":
        # An unknown character scores the lowest score minus 10, so the lowest must not move.
        fixed.add(min(symbols.values(), key=lambda id: model["vocab"][id][1]))
    spells_all = len(byte_tokens) == 256
    if not spells_all and (kind == "Unigram" or model.get("ignore_merges")):
        # What has a character that is no token by itself can be spelt in no other way.
        fixed |= {id for piece, id in symbols.items() if not all(symbol in symbols for symbol in piece)}
    singles = {id for piece, id in symbols.items() if len(piece) == 1}
    # The decoder looks for some characters in the tokens, and would not find them spelt in bytes.
    sought = {symbols[string] for string in _strings(data.get("decoder")) if string in symbols}
    spellable = singles - fixed - sought - {symbols.get(_SPACE)} - set(added.values())
    return TokenGraph(
        kind=_describe(kind, byte_level, bool(byte_tokens)),
        num_ids=max(pieces, default=-1) + 1,
        added=frozenset(added.values()),
        alphabet=frozenset(singles | fixed),
        characters=frozenset(spellable) if spells_all and not byte_level else frozenset(),
        pieces=pieces,
        symbols=symbols,
        merges=_merge_table(model, symbols, textless) if kind == "BPE" else {},
        byte_level=byte_level,
        byte_fallback=bool(byte_tokens),
    )


def _describe(kind: str, byte_level: bool, byte_fallback: bool) -> str:
    if kind == "BPE" and byte_level:
        return "byte-level BPE"
    return "BPE with byte fallback" if kind == "BPE" and byte_fallback else kind


def _merge_table(
    model: Mapping[str, Any], symbols: Mapping[str, int], textless: set[int]
) -> dict[tuple[int, int], tuple[int, int]]:
    strings = {piece for piece, id in symbols.items() if id in textless and len(piece) > 1}
    table = {}
    for rank, (left, right) in enumerate(merge_pairs(model, symbols)):
        if left in strings or right in strings:
            raise TokenizerError(
                f"tokenizer.json merges {left!r} and {right!r}, one of which stands for other text than its own "
                f"characters, so what is made of it cannot be followed. {ADVICE}"
            )
        table[symbols[left], symbols[right]] = rank, symbols[left + right]
    return table


def _has_type(part: Any, kind: str) -> bool:
    if isinstance(part, Mapping):
        return part.get("type") == kind or any(_has_type(value, kind) for value in part.values())
    return isinstance(part, list) and any(_has_type(value, kind) for value in part)


def _strings(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping | list):
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _strings(inner)


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _byte_symbols() -> dict[str, int]:
    # Bytes that print stand for themselves; the others take the characters from 256 on, in order.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF_SYMBOL = _byte_symbols()
