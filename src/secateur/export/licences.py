"""What the dense model's licence asks of whoever shares a pruned copy; a reminder to read it, not legal advice.

What is known of each licence lies in ``licences.toml``. A licence that is neither there nor among the permissive ones
is said to be unknown, because silence would read as permission.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_UNNAMED = ("", "other", "unknown")
_READ_IT = "read it before you share the model; secateur does not know what it asks"
_FIND_IT = "find out which licence the dense model has, and read it, before you share this one"


@dataclass(frozen=True, slots=True)
class Licence:
    """One entry of ``licences.toml``, where its keys are described."""

    ids: tuple[str, ...]
    name: str
    url: str
    duties: tuple[str, ...]
    hints: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    notice: str = ""
    credit: str = ""
    name_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What applies to one pruned model.

    Attributes:
        name: of the licence; "" where nothing is known of it.
        url: where it can be read; "" where that is not known.
        duties: what whoever shares the model must do; empty where carrying the licence over is enough.
        notice: text that a Notice file must hold; "" for none.
        credit: words to show prominently; "" for none.
        name_prefix: with what the shared model's name must begin; "" for anything.
        is_stated: whether the dense model's card states the licence; else it was guessed from its name or type.
    """

    name: str
    url: str = ""
    duties: tuple[str, ...] = ()
    notice: str = ""
    credit: str = ""
    name_prefix: str = ""
    is_stated: bool = True

    def describe(self) -> str:
        """Return the duties as one line; "" where there are none."""
        if not self.duties:
            return ""
        link = f" ({self.url})" if self.url else ""
        if not self.name:
            return f"the dense model's card states no licence: {'; '.join(self.duties)}."
        if not self.is_stated:
            start = f"the dense model's card states no licence; such models come under the {self.name}{link}, which"
        else:
            start = f"the licence of the dense model, {self.name}{link},"
        return f"{start} asks of whoever shares a changed model: {'; '.join(self.duties)}."

    def allows_name(self, repo_id: str) -> bool:
        """Return whether a repository's name begins as it must; spaces, dashes and dots do not count."""
        name, prefix = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (repo_id.split("/")[-1], self.name_prefix))
        return name.startswith(prefix)


def licence_terms(metadata: Mapping[str, Any], *, base_model: str = "", model_type: str = "") -> Terms:
    """Return what the licence of a model asks of whoever shares a pruned copy of it.

    Args:
        metadata: front matter of the dense model's card, or of the pruned one's, which carries it over.
        base_model: name of the dense model, to guess from where no licence is stated.
        model_type: of its configuration, for the same.
    """
    stated = _text(metadata, "license")
    names = [name for name in (stated, _text(metadata, "license_name")) if name.lower() not in _UNNAMED]
    for licence in licences():
        if any(name.lower() in licence.ids for name in names):
            return _terms(licence)
    if stated.lower() in permissive():
        return Terms(stated)
    if names or stated:
        return Terms((names or [stated])[-1], _text(metadata, "license_link"), (_READ_IT,))
    return _guess(base_model.lower(), model_type.removeprefix("pruned_"))


def _guess(base_model: str, model_type: str) -> Terms:
    for licence in licences():
        if any(hint in base_model for hint in licence.hints) or model_type in licence.model_types:
            return _terms(licence, is_stated=False)
    return Terms("", duties=(_FIND_IT,), is_stated=False)


def _terms(licence: Licence, *, is_stated: bool = True) -> Terms:
    return Terms(
        licence.name,
        licence.url,
        licence.duties,
        licence.notice,
        licence.credit,
        licence.name_prefix,
        is_stated,
    )


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key)
    return " ".join(value.split()) if isinstance(value, str) else ""


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((resources.files("secateur.export") / "licences.toml").read_text(encoding="utf-8"))


@cache
def licences() -> tuple[Licence, ...]:
    """Return every licence that asks for more than being carried over."""
    return tuple(_licence(entry) for entry in _data()["licence"])


def _licence(entry: Mapping[str, Any]) -> Licence:
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in entry.items()}
    return Licence(**values)


@cache
def permissive() -> frozenset[str]:
    """Return the ids of licences that ask for no more than being carried over with their notices."""
    return frozenset(_data()["permissive"])
