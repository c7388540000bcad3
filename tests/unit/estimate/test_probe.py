"""The probe and what it rests on: real code on one small layer, text that is counted, and this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from secateur.errors import CorpusError
from secateur.estimate import estimate, machine
from secateur.estimate.probe import ASSUMED, Probe, store_rates, stored_rates
from secateur.estimate.size import size_of_config
from secateur.estimate.texts import TextAmounts
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.files import CACHE_VARIABLE
from secateur.recipe import CorpusSpec, SplitRatios, parse_recipe
from tests.command import replace_in
from tests.conftest import pico_config
from tests.pico import Pico, build_pico, medical_records, pico_tokenizer, write_records
from tests.unit.estimate.papers import on_paper, recipe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A pico project."""
    return build_pico(tmp_path_factory.mktemp("pico"))


def test_one_layer_of_every_family_can_be_timed(family: Family, tmp_path: Path) -> None:
    """The rates that a recipe needs are measured, the others stay; nothing is left behind."""
    size = size_of_config(pico_config(family).to_dict())
    asked = recipe(calibrate={"max_tokens": 256, "block_size": 32, "batch_size": 2}, output=str(tmp_path / "run"))
    cpu = torch.device("cpu")
    found = Probe(asked, size, cpu, torch.float32, torch.float32, seconds=0.0).run()
    assert found.source == "probe"
    assert all(getattr(found, name) != getattr(ASSUMED, name) for name in ("forward", "calibrate", "head", "decode"))
    assert found.training == ASSUMED.training, "nothing is trained"
    assert list(tmp_path.iterdir()) == []


def test_what_a_recipe_needs_besides_is_timed_too(tmp_path: Path) -> None:
    """Gram matrices, least squares, gradients, training."""
    size = size_of_config(pico_config(families()["llama"]).to_dict())
    prune = {"method": "kfac", "budget": {"channels": 0.5}, "reconstruct": "dense"}
    calibrate = {"max_tokens": 256, "block_size": 32, "batch_size": 2}
    asked = recipe(calibrate=calibrate, prune=prune, recover={}, output=str(tmp_path / "run"))
    found = Probe(asked, size, torch.device("cpu"), torch.float32, torch.float32, seconds=0.0).run()
    needed = ("gram", "solve", "gradients", "training", "training_head", "optimizer")
    assert all(getattr(found, name) != getattr(ASSUMED, name) for name in needed)
    assert all(value > 0 for value in asdict(found).values() if isinstance(value, float))


def test_rates_are_kept_for_the_next_time() -> None:
    """Under the machine's key, beside those of others."""
    assert stored_rates("here") is None
    store_rates("here", replace(ASSUMED, head=3.0))
    store_rates("there", ASSUMED)
    found = stored_rates("here")
    assert found is not None and (found.head, found.source) == (3.0, "stored")


def test_small_files_are_counted_and_large_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count is within a tenth of the tokens there are; without one the limit is what may be read at most."""
    file = write_records(tmp_path / "m.jsonl", medical_records(300))
    spec = CorpusSpec(
        path=str(file),
        text="Question: {question}\nAnswer: {answer}",
        splits=SplitRatios(calibration=0.98, validation=0.01, test=0.01),
    )
    tokenizer = pico_tokenizer()
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in medical_records(300)]
    real = sum(map(len, tokenizer(texts)["input_ids"]))
    amounts = TextAmounts({"m": spec}, lambda: tokenizer)
    found = amounts.amount("m", "calibration", None)
    assert not found.at_most and found.tokens == pytest.approx(0.98 * real, rel=0.1)
    assert amounts.amount("m", "calibration", 100).tokens == 100
    replace_in(monkeypatch, "secateur.estimate.texts.SMALL_BYTES", 10)
    unread = TextAmounts({"m": spec}, lambda: tokenizer).amount("m", "calibration", 100)
    assert (unread.tokens, unread.at_most) == (100, True)


def test_an_estimate_leaves_no_run_behind_and_knows_the_text(pico: Pico, tmp_path: Path) -> None:
    """Its tokens are those of the corpus, which has fewer than the recipe allows."""
    asked = parse_recipe(pico.recipe(tmp_path / "run", calibrate={"block_size": 64, "max_tokens": 10**6}))
    found = estimate(asked, probe=False)
    assert not (tmp_path / "run").exists()
    calibrated = next(stage for stage in found.stages if stage.name == "calibrate:medical")
    assert not calibrated.at_most
    tokens = int(calibrated.what.split(" tokens")[0].split("; ")[-1].replace(",", ""))
    assert 1000 < tokens < 100_000
    assert any("assumed" in note for note in found.notes)
    with pytest.raises(CorpusError, match="does not exist"):
        estimate(parse_recipe(pico.recipe(tmp_path / "run", general="nowhere.txt")), probe=False)


def test_a_container_has_what_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smaller of the machine's memory and the limit; of the limit, what others do not use."""
    monkeypatch.setattr(machine, "_container", lambda: (1_000_000, 400_000))
    monkeypatch.setattr(machine, "resident_bytes", lambda: 100_000)
    found = machine.look(tmp_path / "not" / "there", torch.device("cpu"))
    assert (found.memory_bytes, found.memory_free_bytes, found.gpu) == (1_000_000, 700_000, "")
    assert found.disk_free_bytes > 0
    monkeypatch.setattr(machine, "_container", lambda: (None, 0))
    assert machine.look(tmp_path, torch.device("cpu")).memory_bytes > 10_000_000


def test_a_plan_on_paper_is_plain_data() -> None:
    """No file of the recipe exists, and none is looked for."""
    assert json.dumps(on_paper(recipe()).to_dict())
