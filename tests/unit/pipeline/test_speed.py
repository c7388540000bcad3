"""Speeds as a stage of a run, and of folders that somebody names: refused early, kept, and measured again when due."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import CheckpointError, ConfigError
from secateur.evaluate import speed as evaluate_speed
from secateur.files import CACHE_VARIABLE
from secateur.pipeline import speed as module
from secateur.pipeline.speed import SpeedStage, Timed, measure_folders, prompt_ids, read_speed, require_positions
from secateur.recipe import SpeedSpec
from secateur.records.speed import Setting, SpeedComparison
from secateur.store.checkpoints import resolve_model
from secateur.store.run_folder import RunFolder
from tests.command import call
from tests.pico import pico_tokenizer, random_model, save_model_folder

from ..report.speeds import speed_comparison

QUICK = SpeedSpec(prompt_lengths=[8], new_tokens=2, batch_sizes=[1, 2], rounds=2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, and a run's folder with a smaller model in it."""
    place = tmp_path_factory.mktemp("models")
    dense, run = save_model_folder(place / "dense"), place / "run"
    save_model_folder(run / "model", intermediate_size=32, num_key_value_heads=2, num_attention_heads=4)
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    return dense, run


def stage(dense: Path, output: Path, **changes: Any) -> SpeedStage:
    """Return the stage of a run on a model."""
    plain: Mapping[str, Any] = {
        "spec": QUICK,
        "checkpoint": resolve_model(str(dense)),
        "read_texts": lambda name, num_tokens: ("The patient received aspirin at noon.", ""),
        "domains": ["a", "b"],
        "text_key": "text",
        "device": "cpu",
        "dtype": "auto",
        "trust_remote_code": False,
        "folder": RunFolder.open(output),
    }
    return SpeedStage(**{**plain, **changes})


def timed(name: str, folder: Path, fingerprint: str = "abc") -> Timed:
    """Return a model that is to be timed."""
    return Timed(name, fingerprint, folder, 1000, lambda: (random_model(), pico_tokenizer()))


def test_positions_bound_what_may_be_asked(folders: tuple[Path, Path]) -> None:
    """The last prompt that fits passes; one token more is refused, with the length that fits."""
    checkpoint = resolve_model(str(folders[0]))
    require_positions(SpeedSpec(prompt_lengths=[224], new_tokens=32), checkpoint)
    with pytest.raises(ConfigError, match=r"225 tokens with 32 new ones, and model dense knows 256 .* 224 or less"):
        require_positions(SpeedSpec(prompt_lengths=[8, 225], new_tokens=32), checkpoint)
    with pytest.raises(ConfigError, match="Set new_tokens below 256"):
        require_positions(SpeedSpec(prompt_lengths=[8], new_tokens=300), checkpoint)


def test_a_run_refuses_long_prompts_before_anything_else(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The stage's check is enough; without the key there is nothing to check or to measure."""
    with pytest.raises(ConfigError, match="knows 256 positions"):
        stage(folders[0], tmp_path, spec=SpeedSpec()).check()
    absent = stage(folders[0], tmp_path, spec=None)
    absent.check()
    assert absent.measure([]) is None
    assert not (tmp_path / "speed.json").exists()


def test_results_are_kept_and_measured_again_when_something_changed(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same models, settings, text and machine take what is there; another of any of these does not."""
    calls: list[list[str]] = []

    def measured(subjects: Any, settings: Any, **options: Any) -> SpeedComparison:
        calls.append([subject.name for subject in subjects])
        assert settings == [Setting(8, 1, 2), Setting(8, 2, 2)]
        return speed_comparison()

    monkeypatch.setattr(module, "measure_speed", measured)
    models = [timed("dense", folders[0]), timed("pruned", folders[1] / "model")]
    asked: list[tuple[str, int]] = []

    def read(name: str, num_tokens: int) -> list[str]:
        asked.append((name, num_tokens))
        return ["The nurse stopped insulin twice a day."]

    first = stage(folders[0], tmp_path, read_texts=read)
    assert first.measure(models) == speed_comparison()
    assert asked == [("a", 8), ("b", 8)]
    again = stage(folders[0], tmp_path)
    assert again.measure(models) == speed_comparison()
    assert (first.reused, again.reused) == ([], ["evaluate:speed"])
    assert calls == [["dense", "pruned"]]
    stage(folders[0], tmp_path).measure([models[0], replace(models[1], fingerprint="other")])
    stage(folders[0], tmp_path, spec=QUICK.model_copy(update={"rounds": 3})).measure(models)
    stage(folders[0], tmp_path, text_key="other").measure(models)
    stage(folders[0], tmp_path, dtype="bfloat16").measure(models)
    torch.set_num_threads(2)
    try:
        stage(folders[0], tmp_path, dtype="bfloat16").measure(models)
    finally:
        torch.set_num_threads(1)
    assert len(calls) == 6


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """With what to do about it."""
    (tmp_path / "speed.json").write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"speed.json holds no speeds .* Delete it"):
        read_speed(tmp_path / "speed.json")


def test_prompts_are_the_texts_of_each_tokenizer() -> None:
    """Ids of all texts in order, and how many bytes one stands for."""
    tokenizer, texts = pico_tokenizer(), ["The patient refused insulin.", "Łódź lies on a river."]
    ids, bytes_per_token = prompt_ids(texts, tokenizer)
    assert ids.tolist() == [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert bytes_per_token == sum(len(text.encode()) for text in texts) / len(ids)


def test_folders_of_any_kind_are_measured_in_turn(folders: tuple[Path, Path]) -> None:
    """A run's folder stands for the model in it; sizes are exact, and every round is there."""
    speed = secateur.measure_speed(
        *folders, prompt_lengths=[8], new_tokens=2, batch_sizes=[1, 2], rounds=2, with_peaks=False
    )
    assert list(speed.models) == ["dense", "run"]
    smaller = speed.models["run"]
    assert smaller.disk_bytes == (folders[1] / "model" / "model.safetensors").stat().st_size
    assert smaller.memory_bytes == {"float32": 4 * smaller.total_parameters}
    assert smaller.kv_cache.bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert all(len(timing.first_token_s) == len(timing.decode_s) == 2 for timing in smaller.timings)
    assert speed.settings == [Setting(8, 1, 2), Setting(8, 2, 2)]


def test_models_of_the_same_name_have_names_of_their_own(folders: tuple[Path, Path]) -> None:
    """The second is numbered; a folder called ``model`` is named with the folder around it."""
    speed = measure_folders([str(folders[0]), str(folders[0]), str(folders[1] / "model")], QUICK, with_peaks=False)
    assert list(speed.models) == ["dense", "dense (2)", "run/model"]


def test_no_models_are_refused() -> None:
    """There is nothing to measure."""
    with pytest.raises(ConfigError, match="no models are given"):
        secateur.measure_speed()


def test_the_command_prints_tables_or_json(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks of memory are in the tables, and JSON holds every round."""
    monkeypatch.setattr(evaluate_speed, "peak_in_process", lambda subject, setting: (12_345_678, ""))
    options = ("--prompt-lengths", "8", "--batch-sizes", "1,2", "--new-tokens", 2, "--rounds", 2, "-q")
    answer = call(capsys, "speed", *folders, *options)
    assert answer.code == 0
    assert "peak memory (2 x 8 tokens)" in answer.out
    assert "12.3 MB" in answer.out
    assert "Beside dense, run reads prompts" in answer.out
    told = call(capsys, "speed", *folders, *options, "--no-peak", "--json").json()
    assert SpeedComparison.from_dict(json.loads(json.dumps(told))).rounds == 2
    for wrong, message in (("--prompt-lengths", "give whole numbers with commas"), ("--batch-sizes", "is 'x'")):
        refused = call(capsys, "speed", *folders, wrong, "x")
        assert refused.code == 2
        assert message in refused.err
    assert "knows 256 positions" in call(capsys, "speed", *folders).err
