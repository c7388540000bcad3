"""Which passes a recipe asks for, how much text each reads, and what lies in memory beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.estimate import costs
from secateur.estimate.size import size_of_config
from tests.unit.estimate.papers import CONFIG, FFN, LAYER, TOTAL, on_paper, recipe, stage

SIZE = size_of_config(CONFIG)
FORWARD = 4 * (2 * LAYER + 4 * 256 * 100)
"""Operations per token of all layers."""


def test_a_plain_run_has_the_stages_of_its_manifest() -> None:
    """Both texts are calibrated on; the dense and the pruned model are measured."""
    names = [stage.name for stage in on_paper(recipe()).stages]
    assert names == [
        "start and tokenize",
        "calibrate:medical",
        "calibrate:general",
        "plan",
        "shrink",
        "evaluate:dense",
        "evaluate:pruned",
        "report",
    ]


def test_a_calibration_is_one_forward_pass_over_its_text() -> None:
    """Seconds are operations over the rate; the first of them loads the weights, which take memory beside the batch."""
    plan = on_paper(recipe())
    found = stage(plan, "calibrate:medical")
    assert stage(plan, "calibrate:general").seconds == pytest.approx(1024 * FORWARD / 1e9)
    assert found.seconds == pytest.approx((1024 * FORWARD + 2 * TOTAL + 4 * TOTAL) / 1e9)
    assert found.memory["weights file in memory"] == 2 * TOTAL
    assert found.memory["dense weights"] == TOTAL * 4
    assert found.memory["activations"] == costs.activation_bytes(SIZE, 1024, 4)
    assert found.at_most, "nobody has looked how much text there is"


def test_an_evaluation_reads_every_text_and_holds_the_logits_of_a_batch() -> None:
    """Layers of the smaller model cost less, its head costs the same."""
    found = on_paper(recipe())
    dense, pruned = stage(found, "evaluate:dense"), stage(found, "evaluate:pruned")
    assert dense.memory["logits"] == 4 * 256 * 1000 * 4
    assert dense.seconds == pytest.approx(1024 * (FORWARD + 2 * 100 * 1000) / 1e9)
    assert pruned.memory["measured weights"] == (TOTAL - 4 * FFN // 2) * 4
    assert found.parameters_pruned == TOTAL - 4 * FFN // 2


def test_gram_matrices_of_both_splits_lie_on_the_disk() -> None:
    """Calibration text of one pass with the statistics, a quarter more of validation text in a pass of its own."""
    found = on_paper(recipe(prune={"method": "activation_norm", "budget": {"channels": 0.5}, "reconstruct": "dense"}))
    with_grams, judging = stage(found, "calibrate:medical"), stage(found, "gram:medical:validation")
    finished = 4 * 300**2 * 4
    assert with_grams.disk_bytes == judging.disk_bytes == finished
    assert stage(found, "calibrate:general").disk_bytes == 0, "general text does not decide"
    assert judging.seconds == pytest.approx((256 * (FORWARD + 4 * 2 * 300**2 * 9 / 16) + finished) / 1e9)
    assert stage(found, "shrink").memory["equations of one projection"] > 3 * 300**2 * 4


FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"prune": {"method": "taylor", "budget": {"channels": 0.5}}}, "gradients:medical"),
    ({"prune": {"method": "learned_mask", "budget": {"channels": 0.5}, "shape": "uneven"}}, "masks:medical"),
    ({"prune": {"method": "learned_mask", "budget": {"channels": 0.5}, "options": {"lora": True}}}, "masks:medical"),
    ({"prune": {"budget": {"parameters": 0.2}, "shape": "uneven", "allocation": "knapsack"}}, "search:cuts"),
    ({"prune": {"budget": {"parameters": 0.2}, "shape": "uneven", "allocation": "search"}}, "search:evolve"),
    ({"prune": {"budget": {"layers": 0.25}, "units": ["layer"], "depth_method": "perplexity_drop"}}, "search:depth"),
    ({"prune": {"vocabulary": {"min_count": 1}}}, "evaluate:vocabulary"),
    ({"recover": {}}, "recover:recovered"),
    ({"recover": {"baselines": ["dense"]}}, "recover:dense_finetuned"),
    ({"recover": {}}, "recover:random_recovered"),
    ({"recover": {}}, "evaluate:recovered"),
    ({"evaluate": {"max_tokens": 512, "controls": ["random", "reversed"]}}, "evaluate:reversed"),
    ({"evaluate": {"max_tokens": 512, "speed": True}}, "speed"),
    ({"evaluate": {"max_tokens": 512, "generations": True}}, "generations"),
    ({"evaluate": {"max_tokens": 512, "tasks": ["hellaswag"]}}, "tasks"),
    ({"export": [{"to": "gguf", "quantize": "Q8_0"}]}, "export:gguf"),
    (
        {"domain": {"medical": {"path": "m.jsonl", "responses": {"prompt": "Question: {question}"}}}},
        "answer:medical",
    ),
]


@pytest.mark.parametrize(("changes", "name"), FEATURES, ids=str)
def test_everything_that_a_recipe_asks_for_has_a_row(changes: dict[str, Any], name: str) -> None:
    """It takes time and memory; only the time of tasks, whose text nobody knows, is left open."""
    found = stage(on_paper(recipe(**changes)), name)
    assert found.seconds is None if name == "tasks" else found.seconds > 0
    assert found.peak_bytes > 0
    assert found.what


def test_a_fit_on_the_pruned_stream_holds_four_streams_of_all_text() -> None:
    """Calibration and validation text, in the dtype that is computed in."""
    prune = {"method": "activation_norm", "budget": {"channels": 0.5}, "reconstruct": "pruned"}
    found = stage(on_paper(recipe(prune=prune)), "shrink")
    assert found.memory["residual streams of the text"] == 4 * (1024 + 256) * 100 * 4


def test_training_holds_weights_gradients_and_two_moments() -> None:
    """Sixteen bytes per weight in float32, beside the teacher; with adapters, gradients and moments are theirs only."""
    wide = {"recover": {"precision": "float32", "baselines": []}}
    found = stage(on_paper(recipe(**wide)), "recover:recovered")
    small = TOTAL - 4 * FFN // 2
    assert found.memory["trained weights, in float32"] + found.memory["gradients and optimizer"] == 16 * small
    assert found.memory["dense weights"] == 4 * TOTAL
    assert found.memory["logits"] == 3 * 1024 * 1000 * 4, "the student's, their gradient, the teacher's"
    assert found.temporary_bytes == 3 * 12 * small
    adapters = stage(on_paper(recipe(recover={**wide["recover"], "lora": {"rank": 8}})), "recover:recovered")
    assert adapters.memory["gradients and optimizer"] == 12 * costs.lora_parameters(SIZE, 8)


def test_training_takes_three_forward_passes_and_the_teachers_one() -> None:
    """Plus one pass over validation text per evaluation."""
    spec = {"precision": "float32", "baselines": [], "max_tokens": 1024, "evaluations": 1, "evaluation_tokens": 256}
    taught = stage(on_paper(recipe(recover=spec)), "recover:recovered").seconds
    alone = stage(on_paper(recipe(recover={**spec, "method": "finetune"})), "recover:recovered").seconds
    assert taught - alone == pytest.approx(1024 * (FORWARD + 2 * 100 * 1000) / 1e9)


def test_a_gpu_holds_the_model_and_main_memory_the_finished_matrices() -> None:
    """What is on the GPU and what is beside it are told apart."""
    prune = {"method": "activation_norm", "budget": {"channels": 0.5}, "reconstruct": "dense"}
    found = on_paper(recipe(prune=prune), device="cuda", baseline_bytes=10**6)
    assert found.dtype == "bfloat16"
    calibrated = stage(found, "calibrate:medical")
    assert calibrated.memory["dense weights"] == 2 * TOTAL
    assert calibrated.host == {"program and libraries": 10**6, "Gram matrices": 4 * 300**2 * 4}
    assert stage(on_paper(recipe(prune=prune)), "calibrate:medical").host == {}


def test_the_disk_counts_what_stays_and_the_most_that_is_there_at_once() -> None:
    """Checkpoints of a training go when it ends; the baselines' weights too."""
    found = on_paper(recipe(recover={}))
    stays = sum(stage.disk_bytes for stage in found.stages)
    assert found.disk_bytes > stays
    assert stage(found, "recover:dense_finetuned").disk_bytes == 0


@pytest.mark.parametrize(
    "prune",
    [
        {"combine": "guard", "buckets": ["medical", "general"], "budget": {"channels": 0.5}},
        {"budget": {"max_domain_loss": 0.05}},
    ],
)
def test_models_that_are_tried_while_planning_are_paid_for(prune: dict[str, Any]) -> None:
    """Each is measured on validation text, beside the dense model."""
    plain = stage(on_paper(recipe()), "plan")
    tried = stage(on_paper(recipe(prune={"method": "activation_norm", **prune})), "plan")
    assert tried.seconds > plain.seconds + 5 * 512 * FORWARD / 1e9
    assert tried.at_most and "logits" in tried.memory


def test_a_share_of_all_parameters_comes_out_of_what_may_go() -> None:
    """What is left is what was asked, wherever it is taken from; a rule for token ids leaves it open."""
    for units in (["ffn_channel"], ["ffn_channel", "gqa_group"], ["layer"]):
        found = on_paper(recipe(prune={"units": units, "budget": {"parameters": 0.2}}))
        assert found.parameters_pruned == pytest.approx(0.8 * TOTAL, rel=1e-3)
    alone = on_paper(recipe(prune={"units": ["vocabulary"], "budget": {"parameters": 0.1}}))
    assert alone.parameters_pruned == pytest.approx(0.9 * TOTAL, rel=1e-3)
    assert not any(stage.name.startswith("calibrate") for stage in alone.stages)
    assert stage(on_paper(recipe(prune={"vocabulary": {"min_count": 2}})), "shrink").at_most
