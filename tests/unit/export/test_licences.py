"""What licences ask of who shares a pruned model: found by what the card states, guessed where it states nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from secateur.export.licences import Licence, licence_terms, licences, permissive


@pytest.mark.parametrize(
    ("metadata", "base_model", "model_type", "name", "is_stated"),
    [
        ({"license": "gemma"}, "", "", "Gemma Terms of Use", True),
        ({"license": "llama3.1"}, "", "", "Llama 3.1 Community License", True),
        ({"license": "other", "license_name": "llama3"}, "", "", "Meta Llama 3 Community License", True),
        ({"license": "LLAMA2"}, "", "", "Llama 2 Community License", True),
        ({"license": "other", "license_name": "qwen-research"}, "", "", "Qwen Research License", True),
        ({}, "meta-llama/Llama-3.2-1B", "llama", "Llama 3.2 Community License", False),
        ({}, "somebody/clone", "gemma2", "Gemma Terms of Use", False),
        ({}, "somebody/clone", "pruned_gemma3_text", "Gemma Terms of Use", False),
        ({"license": "apache-2.0"}, "meta-llama/Llama-3.2-1B", "gemma2", "apache-2.0", True),
        ({"license": "mit"}, "", "", "mit", True),
    ],
)
def test_a_licence_is_found(
    metadata: dict[str, Any], base_model: str, model_type: str, name: str, is_stated: bool
) -> None:
    """By id, by the name beside ``other``, or by the model where nothing is stated; what is stated always wins."""
    terms = licence_terms(metadata, base_model=base_model, model_type=model_type)
    assert (terms.name, terms.is_stated) == (name, is_stated)
    assert bool(terms.duties) == (name not in permissive())
    assert terms.describe().startswith("the ") == bool(terms.duties)


def test_what_is_not_known_is_not_permission() -> None:
    """An unknown licence says that it is unknown, and a missing one that it is missing; odd metadata is none."""
    unknown = licence_terms({"license": "other", "license_name": "house", "license_link": "https://x.org/l"})
    assert "house (https://x.org/l)" in unknown.describe() and "does not know what it asks" in unknown.describe()
    assert "does not know" in licence_terms({"license": "other"}).describe()
    for metadata in ({}, {"license": None}, {"license": ["mit"]}, {"license": ""}):
        terms = licence_terms(metadata, base_model="somebody/llama", model_type="llama")
        assert not terms.is_stated and "find out which licence" in terms.describe()


def test_a_guess_says_that_it_is_one() -> None:
    """The card stated nothing; such models usually come under these terms."""
    assert (
        "states no licence; such models come under the Gemma Terms" in licence_terms({}, model_type="gemma2").describe()
    )


@pytest.mark.parametrize(
    ("licence", "repo_id", "allowed"),
    [
        ("llama3.1", "me/Llama-3.1-8B-medical", True),
        ("llama3.1", "me/llama_medical", True),
        ("llama3.1", "llama-lovers/medical", False),
        ("llama3", "me/Llama-3-medical", True),
        ("llama3", "me/Llama-medical", False),
        ("llama2", "me/medical", True),
        ("apache-2.0", "me/medical", True),
    ],
)
def test_some_licences_say_how_a_name_begins(licence: str, repo_id: str, allowed: bool) -> None:
    """The model's own name counts, not its owner's."""
    assert licence_terms({"license": licence}).allows_name(repo_id) is allowed


def test_the_list_is_consistent() -> None:
    """Every entry has duties and a source; no id is listed twice; a required Notice is named among the duties."""
    ids = [name for licence in licences() for name in licence.ids]
    assert len(ids) == len(set(ids)) and not set(ids) & permissive()
    for licence in licences():
        assert licence.duties and licence.name and licence.url.startswith("https://")
        assert bool(licence.notice) == any("Notice file" in duty for duty in licence.duties)
        assert not licence.name_prefix or any(f'"{licence.name_prefix}"' in duty for duty in licence.duties)
        assert not licence.credit or any(f'"{licence.credit}"' in duty for duty in licence.duties)
        assert all(duty == duty.strip().rstrip(".") for duty in licence.duties)


def test_every_key_of_the_list_is_read() -> None:
    """An entry with a key that nobody reads is refused."""
    known = {field.name for field in dataclasses.fields(Licence)}
    assert known == {"ids", "name", "url", "duties", "hints", "model_types", "notice", "credit", "name_prefix"}
    with pytest.raises(TypeError):
        Licence(ids=(), name="", url="", duties=(), unread="x")  # type: ignore[call-arg]
