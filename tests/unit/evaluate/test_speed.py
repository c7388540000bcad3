"""How models are timed: the tokens are those of greedy generation, in turn, and the cache takes what is said."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.evaluate import peak_memory_child
from secateur.evaluate import speed as module
from secateur.evaluate.footprint import kv_cache, memory_by_dtype, memory_bytes
from secateur.evaluate.speed import (
    Run,
    Subject,
    in_turn,
    lay_prompts,
    measure_speed,
    peak_in_process,
    random_ids,
    run_once,
)
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.speed import KvCache, Setting
from tests.conftest import geometry_of, pico_model
from tests.pico import random_model, save_model_folder
from tests.pruning import plan_keeping, prune


def cache_bytes(model: Any, num_tokens: int) -> int:
    """Return the bytes of all tensors in the cache after a text of so many tokens."""
    with torch.inference_mode():
        cache = model(random_ids(90, num_tokens).view(1, -1), use_cache=True).past_key_values
    tensors: list[Tensor] = [
        part for layer in cache.layers if layer.is_initialized for part in (layer.keys, layer.values)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def computed(model: Any, family: Family) -> KvCache:
    """Return what we say of a model's cache."""
    return kv_cache(geometry_of(model, family), model.config.to_dict(), model.dtype.itemsize)


def test_the_cache_takes_exactly_what_is_said(family: Family) -> None:
    """In every family, for a text shorter than any window."""
    model = pico_model(family, torch.float32)
    assert (
        cache_bytes(model, 20) == computed(model, family).bytes_at(20) == 20 * computed(model, family).bytes_per_token
    )


@pytest.mark.parametrize(
    ("name", "extra"), [("mistral", {}), ("gemma2", {}), ("gemma3_text", {"sliding_window_pattern": 2})]
)
@pytest.mark.parametrize("num_tokens", [7, 8, 20])
def test_a_window_bounds_the_cache(name: str, extra: dict[str, Any], num_tokens: int) -> None:
    """Below, at and above the window, in models where all layers have one and where some do."""
    family = families()[name]
    model = pico_model(family, torch.float32, sliding_window=8, **extra)
    said = computed(model, family)
    assert said.window == 8
    assert cache_bytes(model, num_tokens) == said.bytes_at(num_tokens)


def test_the_cache_of_uneven_models_and_removed_attention() -> None:
    """Layers with fewer groups keep less, and a layer without attention keeps nothing."""
    family = families()["llama"]
    model = pico_model(family, torch.float32, num_hidden_layers=3)
    geometry = geometry_of(model, family)
    kept = {"gqa_group": [[0, 2], [], [1]], "ffn_channel": [list(range(9)), list(range(64)), list(range(5))]}
    smaller = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    said = computed(smaller, family)
    assert said.bytes_per_token == (2 + 0 + 1) * 2 * 8 * 4
    assert cache_bytes(smaller, 20) == said.bytes_at(20)
    assert computed(model, family).bytes_per_token == 3 * 3 * 2 * 8 * 4


def test_weights_by_dtype_add_up() -> None:
    """Every parameter is counted with its own dtype, tied ones once."""
    model = pico_model(families()["llama"], torch.float32)
    model.lm_head.to(torch.bfloat16)
    sizes = memory_by_dtype(model)
    assert sum(sizes.values()) == memory_bytes(model)
    assert set(sizes) == {"float32", "bfloat16"} or model.config.tie_word_embeddings


def test_the_timed_run_writes_what_greedy_generation_writes(family: Family) -> None:
    """Prefill and steps with the cache give ``generate``'s tokens, for a batch, in every family."""
    model = pico_model(family, torch.float64)
    prompts = random_ids(90, 20, seed=5).view(2, 10)
    run = run_once(model, prompts, 6)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 10:]
    assert run.tokens.tolist() == expected.tolist()
    assert run.first_token_s > 0
    assert run.decode_s > 0


def test_prompts_follow_each_other_and_start_again() -> None:
    """Ids are used in order; when they are used up, from the first one."""
    laid = lay_prompts(torch.arange(7), Setting(4, 3, 2))
    assert laid.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0], [1, 2, 3, 4]]


def test_the_order_turns_around_every_other_round() -> None:
    """Over an even number of rounds each of two models is as often the first as the second."""
    assert [in_turn(2, number) for number in range(4)] == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert in_turn(3, 1) == [2, 1, 0]


def test_models_run_in_turn_within_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short warm-up first, then setting by setting, by both models; numbers land in their rows."""
    calls: list[tuple[str, int, int]] = []

    def told(model: Any, prompts: Tensor, new_tokens: int) -> Run:
        calls.append((names[id(model)], prompts.shape[1], new_tokens))
        return Run(float(len(calls)), 1.0, prompts)

    models = [random_model(), random_model(seed=1)]
    names = {id(model): name for model, name in zip(models, "ab", strict=True)}
    monkeypatch.setattr(module, "run_once", told)
    subjects = [Subject(name, model, random_ids(100, 5)) for name, model in zip("ab", models, strict=True)]
    speed = measure_speed(subjects, [Setting(3, 1, 9), Setting(6, 2, 9)], rounds=2, with_peaks=False)
    assert calls[:4] == [("a", 3, 2), ("b", 3, 2), ("a", 6, 2), ("b", 6, 2)]
    assert [name + str(length) for name, length, _ in calls[4:]] == ["a3", "b3", "a6", "b6", "b3", "a3", "b6", "a6"]
    assert all(new_tokens == 9 for _, _, new_tokens in calls[4:])
    assert speed.models["a"].timings[0].first_token_s == (5.0, 10.0)
    assert speed.models["b"].timings[1].first_token_s == (8.0, 11.0)
    assert (speed.rounds, speed.peak_meaning) == (2, "")
    assert speed.models["a"].kv_cache.bytes_per_token == 2 * 4 * 2 * 8 * 4
    assert speed.machine.threads == 1


@pytest.mark.slow
def test_a_peak_is_that_of_a_process_that_loads_the_model(tmp_path: Path) -> None:
    """It holds the weights once, and little else beside them."""
    model = random_model(intermediate_size=60_000)
    subject = Subject("large", model, random_ids(10, 3), save_model_folder(tmp_path, intermediate_size=60_000))
    peak, problem = peak_in_process(subject, Setting(4, 1, 2))
    assert problem == ""
    assert peak is not None
    assert 0.95 < peak / memory_bytes(model) < 1.8


def test_the_process_answers_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It loads the folder, does the run, and says how far its memory rose; or that the system does not tell."""
    request = {"folder": str(save_model_folder(tmp_path)), "dtype": "float32", "trust_remote_code": False, "threads": 1}
    asked = json.dumps({**request, "prompt_length": 4, "batch_size": 2, "new_tokens": 3})
    held = iter([1000, 5000])
    for told, expected in ((lambda: next(held), {"peak_bytes": 4000, "problem": ""}), (lambda: None, None)):
        monkeypatch.setattr(peak_memory_child, "_most_held", told)
        monkeypatch.setattr("sys.stdin", io.StringIO(asked))
        capsys.readouterr()
        peak_memory_child.main()
        answer = json.loads(capsys.readouterr().out)
        assert answer == (expected or {"peak_bytes": None, "problem": peak_memory_child.NO_RESOURCE})


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last line of its complaint is kept, or the code it ended with; nothing is measured."""
    answers = iter([(1, "Traceback\nOSError: gone\n"), (-9, "")])

    def run(command: Sequence[str], **options: Any) -> CompletedProcess[str]:
        code, complaint = next(answers)
        return CompletedProcess(command, code, "", complaint)

    monkeypatch.setattr("subprocess.run", run)
    models = [Subject(name, random_model(), random_ids(10, 3), tmp_path) for name in "ab"]
    speed = measure_speed(models, [Setting(4, 1, 2)], rounds=1)
    assert speed.peak_meaning == "not measured for a: OSError: gone; not measured for b: the process ended with code -9"
    assert speed.models["a"].peak_bytes is None
