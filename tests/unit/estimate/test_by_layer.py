"""With ``memory: by_layer`` memory does not grow with the layers, and each pass reads them from the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secateur.estimate import estimate_config
from secateur.estimate.by_layer import LIBRARY_BYTES
from tests.unit.estimate.papers import CONFIG, FFN, LAYER, RATES, TOTAL, on_paper, recipe, stage

OUTSIDE = TOTAL - 4 * (LAYER + 200)
FITTED = {"method": "activation_norm", "budget": {"channels": 0.5}, "reconstruct": "pruned"}


def test_memory_is_what_lies_outside_the_layers_and_one_of_them() -> None:
    """Neither the number of layers nor the tokens of the text change the peak; both are on the disk."""
    found = stage(on_paper(recipe(memory="by_layer")), "calibrate:medical")
    assert found.memory["dense weights"] == 4 * OUTSIDE
    assert found.memory["one layer, and its file"] == (4 + 2) * (LAYER + 200)
    assert found.memory["held after the first layers"] == LIBRARY_BYTES
    assert found.temporary_bytes == 1024 * 100 * 4
    asked = recipe(memory="by_layer", calibrate={"max_tokens": 2048, "block_size": 256, "batch_size": 4})
    deeper = estimate_config(asked, {**CONFIG, "num_hidden_layers": 40}, RATES)
    other = stage(deeper, "calibrate:medical")
    assert other.peak_bytes == found.peak_bytes and other.temporary_bytes == 2 * found.temporary_bytes


def test_every_pass_reads_the_layers_and_moves_the_hidden_states() -> None:
    """Both calibrations take the same time, unlike with a model that is loaded once."""
    slow = on_paper(recipe(memory="by_layer"))
    fast = on_paper(recipe())
    found = stage(slow, "calibrate:general").seconds - stage(fast, "calibrate:general").seconds
    moved = 2 * 4 * 1024 * 100 * 4
    assert found == pytest.approx(((2 + 4) * 4 * (LAYER + 200) + moved) / 1e9)
    assert stage(slow, "calibrate:medical").seconds == stage(slow, "calibrate:general").seconds


def test_what_is_cut_lies_on_the_disk() -> None:
    """The smaller model, a control's too, is never in memory; streams of a fit are four on the disk."""
    asked = recipe(memory="by_layer", prune=FITTED, evaluate={"max_tokens": 512, "controls": ["random"]})
    found = on_paper(asked)
    shrink, control = stage(found, "shrink"), stage(found, "evaluate:random")
    small = TOTAL - 4 * FFN // 2
    assert shrink.disk_bytes == 2 * small
    assert not {"weights that were cut", "smaller model, read back", "residual streams of the text"} & set(
        shrink.memory
    )
    assert shrink.temporary_bytes == 4 * (1024 + 256) * 100 * 4
    assert control.temporary_bytes >= 2 * small
    assert found.disk_bytes > on_paper(asked.model_copy(update={"memory": "whole"})).disk_bytes


@pytest.mark.parametrize(("shape", "measured"), [("0.1B", 0.83e9), ("1B", 1.66e9), ("7B", 2.49e9)])
def test_peaks_are_near_those_that_were_measured(shape: str, measured: float) -> None:
    """Within a fifth, for three shapes of random Llamas (BENCHMARKS.md, models larger than memory)."""
    sizes = {
        "0.1B": (768, 2048, 12, 12, 12),
        "1B": (2048, 5632, 22, 32, 32),
        "7B": (4096, 11008, 32, 32, 32),
    }
    hidden, ffn, layers, heads, groups = sizes[shape]
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }
    asked = recipe(
        general=None,
        memory="by_layer",
        dtype="bfloat16",
        calibrate={"max_tokens": 512, "block_size": 128, "batch_size": 1},
        evaluate={"max_tokens": 256, "batch_size": 1, "controls": []},
        prune={"method": "activation_norm", "budget": {"channels": 0.25}},
    )
    found = estimate_config(asked, config, replace(RATES, baseline_bytes=270_000_000))
    assert found.peak_bytes == pytest.approx(measured, rel=0.2)
