"""Multiple-choice questions: records to prompts with their choices, and these to packed rows of tokens.

Prompts and continuations are put together and cut as the LM evaluation harness does it (Gao and others, 2021,
doi:10.5281/zenodo.5371628): a choice follows its prompt after one space, the two are tokenized as one text, and white
space at the prompt's end belongs to the continuation. We differ where a token reaches over the end of the prompt: it
is scored with the choice, for all choices of the question alike. A prompt that is too long loses its start, the same
for all choices, and never the special tokens before it.

Where that is less to read, the choices of a question share its prompt: the prompt's tokens but the last are a piece of
their own, the trunk, and behind it stands for every choice a branch, which begins with the prompt's last token at its
own position. Whoever runs such blocks lets a branch read its trunk and itself (``evaluate.choices``).
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.corpus.choice_baselines import overlap_share
from secateur.corpus.fields import Template, field_value, parse_template, render
from secateur.corpus.files import source_files
from secateur.corpus.formats import FORMATS, PLAIN_SUFFIXES, ReadOptions, check_encoding, read_rows
from secateur.corpus.packing import PackedBlocks
from secateur.corpus.pieces import Piece, place_pieces
from secateur.corpus.readers import encodable
from secateur.corpus.split import document_hash
from secateur.corpus.tokenizing import leading_special_ids, require_fast, tokenize
from secateur.errors import CorpusError
from secateur.recipe import ChoicesSpec

PROMPTS = {"text": "Question: {question}\nAnswer:", "letter": "Question: {question}\n{choices}\nAnswer:"}
"""The prompt of each style, where the recipe gives none."""

LETTERS = string.ascii_uppercase

NO_SUBJECT = "(none)"
"""The subject of questions that leave theirs blank."""

_READINGS = {"index": "an index (from 0)", "letter": "a letter", "text": "the text of a choice"}


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question as a model is asked it.

    Attributes:
        prompt: the text before a choice.
        choices: the texts that are scored, without white space around them; letters in style ``letter``.
        answer: index of the right one.
        where: file and row, for messages.
        subject: what it is about; blank where that is not said.
        overlap: ``overlap_share`` of the question as it was written; None takes that of prompt and choices.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    where: str = field(default="question", compare=False)
    subject: str = field(default="", compare=False)
    overlap: float | None = field(default=None, compare=False)


@dataclass(slots=True, eq=False, kw_only=True)
class PackedChoices(PackedBlocks):
    """Implements ``ChoiceBlocks``; build it with ``pack_choices``. Its documents are rows, and after them trunks.

    The fingerprint is that of the questions alone, so that models with other tokenizers compare on them.
    """

    last_ids: Int64[Tensor, "rows endings"]
    places: tuple[tuple[tuple[int, int], ...], ...]
    answers: tuple[int, ...]
    choice_bytes: tuple[tuple[int, ...], ...]
    num_truncated: int
    choice_starts: Int64[Tensor, " rows"]
    scores_whole: bool
    overlaps: tuple[float, ...]
    subjects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """What a row of a file says, before it is known how its answer is meant."""

    where: str
    row: Mapping[str, Any]
    question: str
    choices: tuple[str, ...]
    readings: Mapping[str, int]


def read_choices(spec: ChoicesSpec, name: str = "choices") -> list[ChoiceItem]:
    """Return the questions of a set, in file order; with ``max_items``, that many, chosen by a hash of each.

    Every row is read and checked, also those that are not chosen. How answers are meant (as indices, letters or texts)
    is settled for the whole set, and refused where it cannot be known.

    Args:
        spec: where the questions are, and how a record becomes one.
        name: of the set, for messages.

    Raises:
        CorpusError: a path, template or record cannot be used, or there is no record; the message names file and row.
    """
    key = f"evaluate.choices.{name}"
    question = parse_template(spec.question, f"{key}.question")
    prompt = parse_template(spec.prompt or PROMPTS[spec.style], f"{key}.prompt")
    check_encoding(spec.encoding)
    records = list(_records(spec, question, prompt, key))
    if not records:
        raise CorpusError(f"set of questions {name!r} is empty: its files hold no record. Give files with questions.")
    answers = _agreed_answers(records, key)
    chosen = _sample(records, spec.max_items, spec.seed)
    return [_item(records[place], answers[place], prompt, spec, key) for place in chosen]


def pack_choices(
    items: Sequence[ChoiceItem],
    tokenizer: Any,
    *,
    block_size: int,
    max_length: int | None = None,
    window: int | None = None,
    scores_whole: bool = False,
    shares_prompts: bool = True,
    name: str = "choices",
) -> PackedChoices:
    """Return the questions as packed rows of tokens.

    Args:
        items: the questions.
        tokenizer: a fast ``transformers`` tokenizer, of the model that will be measured.
        block_size: tokens per block; blocks are as wide as the longest row if that is more.
        max_length: most tokens of a row, such as a model has positions; longer prompts lose their start. None for no
            limit.
        window: tokens back that any layer of the model sees, where that is limited; longer rows share no prompt.
        scores_whole: whether prompts are predicted too, for the perplexity of prompt and choice; then none is shared.
        shares_prompts: whether a prompt may be read once for all its choices.
        name: of the set, for messages.

    Raises:
        CorpusError: there is no question, the tokenizer is not a fast one, a choice has no token of its own or leaves
            no room for its prompt.
    """
    if not items:
        raise CorpusError(f"set of questions {name!r} is empty. Give at least one question.")
    require_fast(tokenizer)
    prefix = leading_special_ids(tokenizer)
    width = block_size if max_length is None else min(block_size, max_length)
    rows = _Rows(prefix, max_length, scores_whole, shares_prompts and not scores_whole)
    for item, (prompt, wholes) in zip(items, _tokenized(items, tokenizer), strict=True):
        rows.add(item, prompt, wholes)
    groups = rows.groups(width, window)
    sizes = [sum(len(piece.ids) for piece in group) for group in groups]
    width = max(width, *sizes)
    placed = place_pieces(sizes, width)
    return PackedChoices(
        name=name,
        split="test",
        fingerprint=_fingerprint(items),
        documents=torch.tensor(rows.hashes, dtype=torch.int64),
        num_tokens=sum(sizes),
        num_blocks=len(placed),
        num_duplicates=0,
        num_excluded=0,
        block_size=width,
        blocks=[[piece for group in block for piece in groups[group]] for block in placed],
        last_ids=_rectangle(rows.last_ids),
        places=tuple(rows.places),
        answers=tuple(item.answer for item in items),
        choice_bytes=tuple(tuple(len(choice.encode()) for choice in item.choices) for item in items),
        num_truncated=rows.num_truncated,
        choice_starts=torch.tensor(rows.starts, dtype=torch.int64),
        scores_whole=scores_whole,
        overlaps=tuple(_overlap(item) for item in items),
        subjects=tuple(item.subject for item in items) if any(item.subject for item in items) else (),
    )


# -- records to questions ------------------------------------------------------------------------------------------


def _records(spec: ChoicesSpec, question: Template, prompt: Template, key: str) -> Iterator[_Record]:
    listed = [spec.choices] if isinstance(spec.choices, str) else spec.choices
    own = [name for name in prompt.fields if name not in ("question", "choices")]
    subject = [] if spec.subject is None else [spec.subject]
    wanted = Template(tuple(("", name) for name in (*question.fields, *own, *listed, spec.answer, *subject)))
    options = ReadOptions(spec.encoding, spec.errors, wanted)
    for path in source_files(spec.path, FORMATS.keys() - PLAIN_SUFFIXES):
        for where, row in read_rows(path, options):
            if not isinstance(row, Mapping):
                raise CorpusError(f"{where} holds one {type(row).__name__}. Give an object with question and choices.")
            text = encodable(render(row, question, where, f"{key}.question"), spec.errors, where)
            if not text.strip():
                raise CorpusError(f"{where}: the question is blank. Remove the row, or correct {key}.question:.")
            choices = tuple(encodable(choice, spec.errors, where) for choice in _choices(row, spec.choices, where, key))
            if spec.style == "letter" and len(choices) > len(LETTERS):
                raise CorpusError(f"{where} has {len(choices)} choices; style letter has {len(LETTERS)} letters.")
            readings = _readings(field_value(row, spec.answer, where, f"{key}.answer"), choices, where, spec.answer)
            yield _Record(where, row, text, choices, readings)


def _choices(row: Mapping[str, Any], names: str | list[str], where: str, key: str) -> list[str]:
    """Return the texts of a row's choices; of several fields, blank ones at the end are choices that it lacks."""
    key = f"{key}.choices"
    if isinstance(names, str):
        shown, values = f"field {names!r}", _as_list(field_value(row, names, where, key), names, where, key)
    else:
        shown, values = f"fields {', '.join(names)}", [field_value(row, name, where, key) for name in names]
    for place, value in enumerate(values):
        if isinstance(value, list | tuple | Mapping | bytes):
            raise CorpusError(
                f"{where}: choice {place} in {shown} is a {type(value).__name__}, not text. Correct {key}:."
            )
    texts = ["" if value is None else str(value).strip() for value in values]
    while texts and not texts[-1] and not isinstance(names, str):
        texts.pop()
    if len(texts) < 2:
        raise CorpusError(
            f"{where} has {len(texts)} choices in {shown}. A question needs at least two; correct the row."
        )
    if "" in texts:
        raise CorpusError(f"{where}: choice {texts.index('')} in {shown} is blank. Correct the row, or remove it.")
    plain = [" ".join(text.split()) for text in texts]
    again = next((place for place, text in enumerate(plain) if text in plain[:place]), None)
    if again is not None:
        raise CorpusError(
            f"{where}: choices {plain.index(plain[again])} and {again} in {shown} are the same, "
            f"{_short(texts[again])}. Correct the row, or remove it."
        )
    return texts


def _as_list(value: Any, name: str, where: str, key: str) -> list[Any]:
    """Return a field that is a list, or a list in JSON as a cell of a CSV file holds it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if isinstance(value, list | tuple):
        return list(value)
    raise CorpusError(
        f"{where}: field {name!r} is not a list of choices but {_short(value)}. Give a list, or name the field of each "
        f"choice: {key}: [a, b, c, d]."
    )


def _readings(value: Any, choices: Sequence[str], where: str, name: str) -> dict[str, int]:
    """Return which choice an answer names when it is read as an index, as a letter, and as a text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    found: dict[str, int] = {}
    if text.isdecimal() and int(text) < len(choices):
        found["index"] = int(text)
    if isinstance(value, int) and not isinstance(value, bool):
        text = ""  # a number is nothing but an index
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        found["letter"] = LETTERS.index(text.upper())
    if text in choices and choices.count(text) == 1:
        found["text"] = choices.index(text)
    if not found:
        last = len(choices) - 1
        raise CorpusError(
            f"{where}: answer {_short(value)} in field {name!r} is none of the {len(choices)} choices: no index from 0 "
            f"to {last}, no letter from A to {LETTERS[min(last, 25)]}, nor the text of exactly one. Correct the row."
        )
    return found


def _agreed_answers(records: Sequence[_Record], key: str) -> list[int]:
    """Return each record's answer, all read in the same way."""
    ways = set(_READINGS)
    for record in records:
        if not ways & set(record.readings):
            raise CorpusError(
                f"{record.where}: the answer can only be {_named(record.readings)}, and those before it only "
                f"{_named(ways)}. Write all answers in the same way."
            )
        ways &= set(record.readings)
    answers = {way: [record.readings[way] for record in records] for way in _READINGS if way in ways}
    first, *others = answers.values()
    if any(other != first for other in others):
        raise CorpusError(
            f"{records[0].where} and after: every answer can be {_named(ways)}, which do not name the same choices. "
            f"Write them in one clear way (numbers, letters) in the field of {key}.answer."
        )
    return first


def _named(ways: set[str] | Mapping[str, int]) -> str:
    return " or ".join(words for way, words in _READINGS.items() if way in ways)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _sample(records: Sequence[_Record], max_items: int | None, seed: int) -> list[int]:
    """Return the places of the questions that are asked, ascending; more of them include those of fewer."""
    if max_items is None or len(records) <= max_items:
        return list(range(len(records)))

    def draw(place: int) -> bytes:
        record = records[place]
        plain = json.dumps([seed, record.question, record.choices])
        return hashlib.blake2b(plain.encode(), digest_size=8, person=b"secateur-choice").digest()

    return sorted(sorted(range(len(records)), key=draw)[:max_items])


def _item(record: _Record, answer: int, prompt: Template, spec: ChoicesSpec, key: str) -> ChoiceItem:
    letters = tuple(LETTERS[: len(record.choices)])
    listing = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, record.choices, strict=False))
    fields = {**record.row, "question": record.question, "choices": listing}
    text = encodable(render(fields, prompt, record.where, f"{key}.prompt"), spec.errors, record.where)
    told = Template(tuple((" ", name) for name in dict.fromkeys(("question", *prompt.fields)) if name != "choices"))
    return ChoiceItem(
        text,
        letters if spec.style == "letter" else record.choices,
        answer,
        record.where,
        _subject(record, spec, key),
        overlap_share(render(fields, told, record.where, f"{key}.prompt"), record.choices, answer),
    )


def _subject(record: _Record, spec: ChoicesSpec, key: str) -> str:
    if spec.subject is None:
        return ""
    value = field_value(record.row, spec.subject, record.where, f"{key}.subject")
    if isinstance(value, list | tuple | Mapping | bytes):
        raise CorpusError(
            f"{record.where}: field {spec.subject!r} is a {type(value).__name__}, not the name of a subject. Correct "
            f"{key}.subject:."
        )
    return encodable(" ".join(str("" if value is None else value).split()), spec.errors, record.where) or NO_SUBJECT


def _overlap(item: ChoiceItem) -> float:
    return overlap_share(item.prompt, item.choices, item.answer) if item.overlap is None else item.overlap


# -- questions to rows ---------------------------------------------------------------------------------------------


def _tokenized(items: Sequence[ChoiceItem], tokenizer: Any) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield for each question the tokens of its prompt alone, and of its prompt with each of its choices."""
    prompts = tokenize([item.prompt.rstrip() for item in items], tokenizer)
    wholes = iter(tokenize([_whole(item, choice) for item in items for choice in item.choices], tokenizer))
    for item, prompt in zip(items, prompts, strict=True):
        yield prompt, [next(wholes) for _ in item.choices]


def _whole(item: ChoiceItem, choice: str) -> str:
    """Return prompt and choice with white space between them: the prompt's own, or one space."""
    return item.prompt + choice if item.prompt != item.prompt.rstrip() else f"{item.prompt} {choice}"


class _Rows:
    """Rows as they come together, question after question."""

    def __init__(self, prefix: list[int], max_length: int | None, scores_whole: bool, shares: bool) -> None:
        self.prefix = prefix
        self.max_length = max_length
        self.scores_whole = scores_whole
        self.shares = shares
        self.questions: list[tuple[int, list[Piece]]] = []
        self.starts: list[int] = []
        self.hashes: list[int] = []
        self.last_ids: list[list[int]] = []
        self.places: list[tuple[tuple[int, int], ...]] = []
        self.num_truncated = 0

    def add(self, item: ChoiceItem, prompt: list[int], wholes: list[list[int]]) -> None:
        """Add the rows of a question."""
        num_context = min(_common_length(prompt, whole) for whole in wholes)
        if any(len(whole) == num_context for whole in wholes) or not self.prefix + prompt[:num_context]:
            raise CorpusError(
                f"{item.where}: the tokenizer gives the prompt or a choice no token of its own. Correct the question."
            )
        start = self._start(item, num_context, max(map(len, wholes)))
        self.num_truncated += start > 0
        rows: dict[tuple[int, ...], int] = {}
        pieces: list[Piece] = []
        places = []
        for choice, whole in zip(item.choices, wholes, strict=True):
            row = rows.setdefault(tuple(whole[:-1]), len(self.starts))
            if row == len(self.starts):
                ids = np.array(self.prefix + whole[start:], dtype=np.int32)
                self.starts.append(len(self.prefix) + num_context - start)
                context = max(len(self.prefix), 1) if self.scores_whole else self.starts[row]
                pieces.append(Piece(ids, row, len(choice.encode()), len(self.prefix), context))
                self.hashes.append(document_hash(_whole(item, choice)))
                self.last_ids.append([])
            places.append((row, len(self.last_ids[row])))
            self.last_ids[row].append(whole[-1])
        self.questions.append((document_hash(item.prompt), pieces))
        self.places.append(tuple(places))

    def groups(self, width: int, window: int | None) -> list[list[Piece]]:
        """Return the pieces that must stand together: a row by itself, or a trunk with its branches.

        Trunks are documents too, counted after the rows.
        """
        found: list[list[Piece]] = []
        for prompt_hash, rows in self.questions:
            shared = self._shared(rows, width, window)
            if shared:
                self.hashes.append(prompt_hash)
            found += [shared] if shared else [[row] for row in rows]
        return found

    def _shared(self, rows: list[Piece], width: int, window: int | None) -> list[Piece]:
        """Return the trunk and the branches of a question; nothing where its rows are to be read one by one."""
        context = self.starts[rows[0].document]
        branches = [
            replace(row, ids=row.ids[context - 1 :], num_prefix=0, num_context=1, first_position=context - 1)
            for row in rows
        ]
        size = context - 1 + sum(len(branch.ids) for branch in branches)
        longest = max(len(row.ids) for row in rows)
        if (
            not self.shares
            or context < 2
            or size >= sum(len(row.ids) for row in rows)
            or size > max(width, longest)
            or (window is not None and longest > window)
        ):
            return []
        ids = rows[0].ids[: context - 1]
        return [Piece(ids, len(self.hashes), 0, len(self.prefix), len(ids)), *branches]

    def _start(self, item: ChoiceItem, num_context: int, longest: int) -> int:
        """Return how many tokens of the prompt are left out, so that the longest row fits."""
        if self.max_length is None:
            return 0
        start = max(0, len(self.prefix) + longest - self.max_length)
        if start > num_context - (not self.prefix):
            raise CorpusError(
                f"{item.where}: the longest choice has {longest - num_context} tokens, and only {self.max_length} fit "
                "with at least one before them. Shorten the choice, or remove the question."
            )
        return start


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two runs of tokens share from the start."""
    different = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _rectangle(last_ids: Sequence[Sequence[int]]) -> Int64[Tensor, "rows endings"]:
    endings = max(map(len, last_ids))
    return torch.tensor([[*ids, *[ids[0]] * (endings - len(ids))] for ids in last_ids], dtype=torch.int64)


def _fingerprint(items: Sequence[ChoiceItem]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps([item.prompt, item.choices, item.answer]).encode() + b"\n")
    return digest.hexdigest()
