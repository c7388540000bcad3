"""The model card: metadata that the hub reads, the licence carried over, and words that fit the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.export.model_card import read_front_matter, render_model_card
from tests.unit.report.records import plan


def card(base_metadata: dict[str, Any] | None = None, **changes: Any) -> str:
    """Return the card of the made-up plan."""
    plain: dict[str, Any] = {
        "base_model": "HuggingFaceTB/SmolLM2-1.7B",
        "base_metadata": base_metadata or {},
        "domains": ["medical"],
        "tables": ["| a |\n|---|\n| 1 |\n"],
        "summary": "14.3% fewer parameters.",
        "version": "0.1.0",
    }
    return render_model_card(changes.pop("plan", plan()), **{**plain, **changes})


def metadata(text: str) -> dict[str, Any]:
    """Return what stands between the first two rules, read as YAML."""
    assert text.startswith("---\n")
    data: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return data


def test_the_front_matter_is_what_the_hub_reads() -> None:
    """Valid YAML with library, task, tags and the base model."""
    data = metadata(card())
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "secateur"],
        "base_model": "HuggingFaceTB/SmolLM2-1.7B",
    }


def test_the_licence_is_the_base_models() -> None:
    """Licence, its name and link, and the languages are carried over; nothing else is."""
    base = {
        "license": "other",
        "license_name": "gemma",
        "license_link": "https://ai.google.dev/gemma/terms",
        "language": ["en", "łac"],
        "datasets": ["private"],
    }
    text = card(base)
    data = metadata(text)
    assert {key: data[key] for key in ("license", "license_name", "license_link", "language")} == {
        key: base[key] for key in ("license", "license_name", "license_link", "language")
    }
    assert "datasets" not in data
    assert "Licence: other, as the base model." in text


def test_an_unknown_licence_is_said_to_be_unknown() -> None:
    """Silence would read as permission."""
    text = card()
    assert "license" not in metadata(text)
    assert "did not state it in its model card; check before you share this" in text


def test_a_local_folder_is_no_base_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a hub id is one; paths are shown by their last part and do not leak."""
    text = card(base_model="/home/somebody/models/pico-llama")
    assert "base_model" not in metadata(text)
    assert "/home/somebody" not in text
    assert "# pico-llama, pruned for medical" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "pico").mkdir(parents=True)
    assert "base_model" not in metadata(card(base_model="models/pico"))


def test_the_card_says_what_was_cut_and_what_was_measured() -> None:
    """Units, parameters, method, budget, text, tables, summary and limits."""
    text = card(domains=["medical", "law"])
    for words in (
        "# SmolLM2-1.7B, pruned for medical, law",
        "| FFN channels | 2 | 8 | 25.0% | 500,000 | 100.0% |",
        "3,501,000 parameters became 3,001,000",
        "Method `contextual`, budget {'channels': 0.25}, shape `uniform`",
        "65,536 tokens of medical",
        "| a |\n|---|\n| 1 |",
        "14.3% fewer parameters.",
        "## Limits",
        "secateur 0.1.0",
    ):
        assert words in text
    assert "Not measured yet." in card(tables=())


def test_only_uneven_models_need_secateur() -> None:
    """The lines to paste import it where it is needed and nowhere else."""
    assert "import secateur" not in card()
    uneven = card(plan=plan(shape="uneven"))
    assert uneven.index("import secateur") < uneven.index("from transformers import")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("---\nlicense: mit\n---\n# M", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n# M", {"license": "mit"}),
        ("---\nlanguage:\n- en\n---\n\ntext\n---\nmore: 1\n---\n", {"language": ["en"]}),
        ("# M\n---\nlicense: mit\n---\n", {}),
        ("---\n[: broken\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter_is_read_where_there_is_some(tmp_path: Path, content: str, expected: dict[str, Any]) -> None:
    """Only at the very top, only if it is YAML, only if it is a mapping."""
    (tmp_path / "README.md").write_bytes(content.encode())
    assert read_front_matter(tmp_path) == expected


def test_a_folder_without_a_card_has_no_metadata(tmp_path: Path) -> None:
    """Nor has one whose card is not text."""
    assert read_front_matter(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_front_matter(tmp_path) == {}


def test_a_card_can_be_read_back(tmp_path: Path) -> None:
    """A pruned model that is pruned again keeps its licence."""
    (tmp_path / "README.md").write_text(card({"license": "apache-2.0"}), encoding="utf-8")
    assert read_front_matter(tmp_path)["license"] == "apache-2.0"
