"""The model card: metadata that the hub reads, the licence carried over, and words that fit the plan."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from secateur.export.model_card import Corpus, Origin, read_front_matter, render_model_card
from tests.unit.report.records import evaluation, plan


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
        "base_model_relation": "finetune",
    }


def test_the_licence_is_the_base_models() -> None:
    """Licence, its name and link, and the languages are carried over; nothing else is."""
    base = {
        "license": "other",
        "license_name": "someones-own",
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
    assert "Licence: other (someones-own), as the base model." in text
    assert "read it before you share the model" in text


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
        "## Intended use",
        "## What was forgotten",
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


def hub_card(text: str) -> ModelCard:
    """Return the card as Hugging Face's own reader understands it; it refuses what the hub would."""
    return ModelCard(text, ignore_metadata_errors=False)


def test_measurements_are_in_the_hubs_form() -> None:
    """One result per bucket of this model's row, not the dense model's, with the data set's id where it has one."""
    corpora = [Corpus("medical", dataset="org/medical", config="qa"), Corpus("general", size_bytes=1000)]
    text = card(evaluation=evaluation(), corpora=corpora)
    data = hub_card(text).data
    found = {(r.dataset_name, r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("medical", "org/medical", "perplexity"): pytest.approx(math.exp(2.1), rel=1e-4),
        ("medical", "org/medical", "bits_per_byte"): pytest.approx(1.05),
        ("general", "text", "perplexity"): pytest.approx(math.exp(2.6), rel=1e-4),
        ("general", "text", "bits_per_byte"): pytest.approx(1.3),
    }
    assert data.eval_results[0].dataset_config == "qa"
    assert data.datasets == ["org/medical"], "general text only controls, and local files have no id"
    recovered = evaluation(dense=2.0, pruned=2.5, recovered=2.2)
    text = card(evaluation=recovered, row="recovered")
    assert hub_card(text).data.eval_results[0].metric_value == pytest.approx(math.exp(2.2), rel=1e-4)


def test_results_on_several_local_corpora_stay_apart() -> None:
    """Hugging Face's reader merges results whose data sets it cannot tell apart; written again they are the same."""
    text = card(evaluation=evaluation())
    again = hub_card(text).data.to_dict()["model-index"]
    assert again == metadata(text)["model-index"] and len(again[0]["results"]) == 2


def test_what_is_not_a_number_is_not_reported() -> None:
    """A broken model has no perplexity that YAML and the hub could hold."""
    measured = evaluation(dense=2.0, pruned=math.inf)
    metrics = [r.metric_type for r in hub_card(card(evaluation=measured)).data.eval_results or ()]
    assert "bits_per_byte" not in metrics
    assert "model-index" not in metadata(card(evaluation=evaluation(dense=2.0)))


def test_what_was_forgotten_is_said_in_numbers() -> None:
    """General text, in units that a changed tokenizer leaves comparable; and plainly where nothing was measured."""
    text = card(evaluation=evaluation(dense=2.0, pruned=2.0 + math.log(1.5)))
    assert "On general text its loss is 1.4527 ± 0.0050 bits per byte, where the dense model's is 1.2500" in text
    assert "the perplexity there is 1.500000 ± 0.000000 times the dense model's" in text
    assert "Not measured yet. On other text than the above expect it to have lost more." in card()
    only = evaluation()
    models = {n: dataclasses.replace(m, text={"medical": m.text["medical"]}) for n, m in only.models.items()}
    only = dataclasses.replace(only, models=models)
    assert "Text outside its domains was not measured" in card(evaluation=only)


def test_text_and_making_are_described_without_paths() -> None:
    """Names, sizes, fingerprints, versions and the recipe; of a path only the last part."""
    origin = Origin(
        hub_id="org/model",
        model_fingerprint="abc123",
        versions={"torch": "2.6"},
        recipe={
            "prune": {"method": "contextual", "vocabulary": {"keep_file": ["/home/me/secret place/keep.txt"]}},
            "recover": {"teacher": "C:\\Users\\me\\teacher", "also": "data/private/x.jsonl", "prompt": "a / b"},
        },
    )
    corpora = [Corpus("medical", size_bytes=2_500_000, calibration_tokens=65_536, fingerprint="f" * 32)]
    text = card(origin=origin, corpora=corpora)
    assert f"- medical: 2.5 MB of local files, 65,536 tokens calibrated on, fingerprint `{'f' * 12}`" in text
    assert "`abc123`" in text and "torch 2.6" in text and "- keep.txt" in text and "prompt: a / b" in text
    for path in ("/home", "secret place", "Users", "private"):
        assert path not in text


def test_a_local_model_names_what_it_was_made_from() -> None:
    """A model pruned twice still names the hub's model; a folder's name never passes for a hub id."""
    origin = Origin(hub_id="")
    assert metadata(card({"base_model": "org/first"}, base_model="pico", origin=origin))["base_model"] == "org/first"
    assert "base_model" not in metadata(card(base_model="pico/llama", origin=origin))
    assert "base_model" not in metadata(card({"base_model": ["a/b", "c/d"]}, base_model="pico", origin=origin))


def test_a_link_to_a_licence_file_leads_to_the_base_model() -> None:
    """A relative link would lead into this repository, which may not hold the file."""
    base = {"license": "other", "license_name": "x", "license_link": "LICENSE"}
    link = "https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B/blob/main/LICENSE"
    assert metadata(card(base))["license_link"] == link
    assert metadata(card(base, base_model="pico", origin=Origin()))["license_link"] == "LICENSE"


@pytest.mark.parametrize(
    ("stated", "kept"), [("en", ["en"]), (["en", False], ["en", "no"]), ({"a": 1}, None), (["", 3, None], None)]
)
def test_languages_are_codes(stated: Any, kept: list[str] | None) -> None:
    """YAML reads a bare no as false, which is Norwegian; other things are not languages."""
    assert metadata(card({"language": stated})).get("language") == kept


def test_duties_of_a_licence_stand_at_the_top_and_its_credit_and_notice_at_the_end() -> None:
    """So nobody shares the model without having seen them."""
    text = card({"license": "llama3.1"}, base_model="meta-llama/Llama-3.1-8B")
    assert text.index("> **Before you share it:**") < text.index("## What was cut")
    ending = text[text.index("## Licence") :]
    assert "**Built with Llama**" in ending and "Copyright © Meta Platforms" in ending
    assert '- Begin the model\'s name with "Llama".' in ending
    assert "Before you share it" not in card({"license": "apache-2.0"})


_NASTY = "evil\n---\nlicense: mit\n# <script>alert(1)</script> | [x](javascript:y) `z` : {a: &b *b} 'q' \"r\" \u2028"


def test_names_cannot_break_out_of_the_metadata_or_the_text() -> None:
    """Line breaks, quotes, YAML, HTML, links and table borders in names and in the dense model's card stay text."""
    base = {key: _NASTY for key in ("license", "license_name", "license_link")} | {"language": [_NASTY]}
    domains = ["medical", _NASTY]
    named = dataclasses.replace(plan(), calibrated_on=(_NASTY,), notes=(_NASTY,), budget={_NASTY: 0.5})
    measured = evaluation()
    score = measured.models["dense"].text["general"]
    models = {n: dataclasses.replace(m, text={**m.text, _NASTY: score}) for n, m in measured.models.items()}
    text = card(
        base,
        plan=named,
        domains=domains,
        base_model=_NASTY,
        summary=f"On {_NASTY} it is well.",
        evaluation=dataclasses.replace(measured, models=models),
        corpora=[Corpus(_NASTY, dataset="", size_bytes=5)],
        origin=Origin(recipe={"prune": {_NASTY: "```\n# out"}}),
    )
    data = metadata(text)
    assert data["license"] == " ".join(_NASTY.split()) != "mit"
    assert set(data) == {
        *("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags", "model-index")
    }
    parsed = hub_card(text)
    assert parsed.data.to_dict()["license"] == data["license"]
    body = parsed.text
    shown = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)  # code shows everything as it is
    assert "<script>" not in shown and "](javascript" not in shown
    headings = [line for line in body.splitlines() if line.startswith("# ")]
    assert len(headings) == 1 + body.count("\n# out"), "no name starts a heading"
    assert "---" not in body.splitlines(), "no name draws a rule"
    assert "````yaml" in body, "the fence is longer than those in the recipe"
