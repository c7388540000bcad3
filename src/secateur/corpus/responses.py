"""A model's answers as packed token blocks in which only the answers are predicted, and under another vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.corpus.packing import PackedBlocks, digest_pieces, restrict
from secateur.corpus.pieces import Piece, place_pieces
from secateur.corpus.split import Split
from secateur.corpus.tokenizing import leading_special_ids, require_fast, tokenize
from secateur.errors import CorpusError
from secateur.records.responses import Response


def response_blocks(
    responses: Sequence[Response],
    documents: Sequence[int],
    *,
    block_size: int,
    split: Split = "calibration",
    name: str = "responses",
) -> tuple[PackedBlocks, int]:
    """Return the answers as packed blocks, and how many were dropped because their prompt fills a block.

    A piece is a prompt and its answer, with positions from 0; exactly the answer's tokens are predicted, its
    end-of-text token too where the model wrote one. An answer that reaches over the end of a block is cut there.

    Args:
        responses: the answers.
        documents: hashes of the documents that the prompts are of, by ``Response.index``.
        block_size: tokens per block.
        split: of those documents.
        name: of the text, for messages and manifests.

    Raises:
        CorpusError: no prompt leaves room for an answer, or an answer or a prompt has no tokens.
    """
    pieces: list[Piece] = []
    hashes: list[int] = []
    for response in responses:
        if not response.prompt_ids or not response.response_ids:
            raise CorpusError(
                f"prompt {response.index} or its answer has no tokens, so that there is nothing to learn. Leave empty "
                "answers out, and give every prompt some text."
            )
        if len(response.prompt_ids) < block_size:
            pieces.append(_piece(response, len(hashes), block_size))
            hashes.append(documents[response.index])
    if not pieces:
        raise CorpusError(
            f"none of {len(responses)} prompts of corpus {name!r} leaves room for an answer in a block of {block_size} "
            "tokens. Raise calibrate.block_size, or shorten recover.responses.prompt."
        )
    placed = place_pieces([len(piece.ids) for piece in pieces], block_size)
    header = ["responses", split, block_size, hashes, [piece.num_context for piece in pieces]]
    blocks = PackedBlocks(
        name=name,
        split=split,
        fingerprint=digest_pieces(header, pieces),
        documents=torch.tensor(hashes, dtype=torch.int64),
        num_tokens=sum(len(piece.ids) for piece in pieces),
        num_blocks=len(placed),
        num_duplicates=0,
        num_excluded=0,
        block_size=block_size,
        blocks=[[pieces[piece] for piece in block] for block in placed],
    )
    return blocks, len(responses) - len(pieces)


def responses_split(
    responses: Sequence[Response],
    documents: Sequence[int],
    *,
    block_size: int,
    max_tokens: int | None,
    name: str,
    where: str,
) -> PackedBlocks:
    """Return the answers, with their prompts, as the calibration split of a corpus.

    Prompt and answer are one piece, and the answer is what is predicted of it. Pieces are taken whole, in the order of
    the answers, for as long as they have no more tokens than allowed.

    Args:
        responses: the answers, in the order of their documents' hashes.
        documents: hashes of the documents that the prompts are of, by ``Response.index``.
        block_size: tokens per block.
        max_tokens: most tokens to take; None for all.
        name: of the corpus.
        where: the recipe's key for how the prompts were asked, for messages.

    Raises:
        CorpusError: there is less than a block of answers, or less than a block is asked for.
    """
    require_block(max_tokens, block_size)
    blocks, _ = response_blocks(responses, documents, block_size=block_size, name=name)
    if blocks.num_tokens < block_size:
        raise CorpusError(
            f"corpus {name!r}: {len(responses)} prompts and their answers have {blocks.num_tokens} tokens; one block "
            f"needs {block_size}: give more records, raise {where}.max_new_tokens or lower calibrate.block_size."
        )
    return restrict(blocks, range(blocks.num_documents), max_tokens)


def require_block(max_tokens: int | None, block_size: int) -> None:
    """Raise CorpusError if fewer tokens are asked for than a block has."""
    if max_tokens is not None and max_tokens < block_size:
        raise CorpusError(
            f"max_tokens {max_tokens} is less than one block of {block_size} tokens: raise calibrate.max_tokens or "
            "lower calibrate.block_size."
        )


def renumber_responses(
    responses: Sequence[Response], keep: Sequence[int] | Int64[Tensor, " kept"], tokenizer: Any
) -> list[Response]:
    """Return the answers in the ids of a smaller vocabulary, those that have no tokens in it left out.

    Where all tokens of a prompt or an answer stay, they are the same tokens under their new numbers; otherwise its text
    is tokenized anew.

    Args:
        responses: in the ids of the dense model.
        keep: dense id of each new id.
        tokenizer: the smaller vocabulary's, a fast one.

    Raises:
        CorpusError: the tokenizer is not a fast one.
    """
    require_fast(tokenizer)
    number = {int(dense): new for new, dense in enumerate(torch.as_tensor(keep).tolist())}
    prefix = leading_special_ids(tokenizer)
    found = []
    for response in responses:
        prompt_ids = _renumbered(response.prompt_ids, number)
        num_prefix = response.num_prefix
        if prompt_ids is None:
            start = prefix if response.num_prefix else []
            prompt_ids, num_prefix = [*start, *tokenize([response.prompt], tokenizer)[0]], len(start)
        answer_ids = _renumbered(response.response_ids, number)
        if answer_ids is None:
            ending = number.get(response.response_ids[-1]) if response.ended else None
            answer_ids = [*tokenize([response.text], tokenizer)[0], *([] if ending is None else [ending])]
        if prompt_ids and answer_ids:
            found.append(
                replace(
                    response,
                    prompt_ids=tuple(prompt_ids),
                    response_ids=tuple(answer_ids),
                    num_prefix=num_prefix,
                )
            )
    return found


def _piece(response: Response, document: int, block_size: int) -> Piece:
    """Return the piece; the bytes of an answer that is cut are shared out by tokens."""
    num_prompt = len(response.prompt_ids)
    fitting = min(len(response.response_ids), block_size - num_prompt)
    num_bytes = len(response.text.encode(errors="surrogatepass"))
    return Piece(
        ids=np.array([*response.prompt_ids, *response.response_ids[:fitting]], dtype=np.int32),
        document=document,
        num_bytes=num_bytes * fitting // len(response.response_ids),
        num_prefix=response.num_prefix,
        num_context=num_prompt,
    )


def _renumbered(ids: Sequence[int], number: dict[int, int]) -> list[int] | None:
    """Return the new numbers of the ids; None where one is gone."""
    new = [number.get(token) for token in ids]
    return None if None in new else [token for token in new if token is not None]
