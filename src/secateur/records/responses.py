"""What a model answered to prompts: the token ids it read and wrote, and the text of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Response:
    """One prompt and the answer to it.

    Attributes:
        index: place of the prompt among all prompts.
        prompt: the prompt as the model read it, with its chat template where there is one.
        text: the answer, without special tokens.
        prompt_ids: token ids of the prompt.
        response_ids: token ids of the answer; the last is the end-of-text token if the model wrote one.
        num_prefix: leading ``prompt_ids`` that are not of the prompt's text, such as a BOS.
        ended: whether the model ended the answer itself.
    """

    index: int
    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    num_prefix: int
    ended: bool

    @property
    def is_empty(self) -> bool:
        """Whether the answer says nothing: no text but white space."""
        return not self.text.strip()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Response:
        """Return the response that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong.
        """
        ids = {name: tuple(int(token) for token in data[name]) for name in ("prompt_ids", "response_ids")}
        return cls(**{**data, **ids})


@dataclass(frozen=True, slots=True)
class Responses:
    """The answers to a list of prompts, or to the first of them where answers were enough before its end.

    Attributes:
        responses: those that say something, in the order of the prompts.
        num_empty: prompts to which the model said nothing.
        num_too_long: prompts that were not asked because they are too long.
        num_unended: of the responses, those that were cut at the most tokens allowed.
    """

    responses: tuple[Response, ...]
    num_empty: int
    num_too_long: int
    num_unended: int

    def counts(self) -> dict[str, int]:
        """Return how many there are of each, as a manifest records them."""
        return {
            "prompts": len(self.responses) + self.num_empty + self.num_too_long,
            "answers": len(self.responses),
            "empty": self.num_empty,
            "prompts_too_long": self.num_too_long,
            "cut_short": self.num_unended,
        }
