"""The stages as functions on loaded models: same results as a run, and nothing of the caller's is changed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur import pipeline
from secateur.corpus import document_hash
from secateur.errors import ConfigError, CorpusError, PlanError
from secateur.files import CACHE_VARIABLE
from secateur.recipe import CorpusSpec, load_recipe, parse_recipe
from secateur.records.plan import Plan
from secateur.records.statistics import Statistics
from secateur.store.checkpoints import fingerprint_loaded
from tests.pico import Pico, build_pico, general_paragraphs, pico_tokenizer, random_model

SMALL: dict[str, Any] = {"max_tokens": 1024, "block_size": 64, "batch_size": 8}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The pico tokenizer."""
    return pico_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """A model of the test's own."""
    return random_model(len(tokenizer))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents in memory."""
    return general_paragraphs(400)


@pytest.fixture(scope="module")
def statistics(tokenizer: Any, texts: list[str]) -> Statistics:
    """The statistics of the documents on the model."""
    return secateur.calibrate(random_model(len(tokenizer)), tokenizer, texts, **SMALL)


def test_the_stages_fit_together(model: Any, tokenizer: Any, texts: list[str], statistics: Statistics) -> None:
    """Calibrate, plan, shrink and evaluate as the module's docstring shows them."""
    plan = secateur.plan(model, statistics, budget={"channels": 0.25})
    smaller = secateur.shrink(model, plan)
    assert smaller.num_parameters() == plan.total_pruned < model.num_parameters() == plan.total_dense
    assert smaller.config.intermediate_size == 72
    score = secateur.evaluate(smaller, tokenizer, texts, exclude=statistics, **SMALL)
    assert score.num_tokens > 500 and score.perplexity > 1
    generated = smaller.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 6)


def test_the_api_plans_what_a_run_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model, text and options give the same kept units, and the same losses."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    pico: Pico = build_pico(tmp_path)
    recipe = pico.recipe(tmp_path / "run")
    result = secateur.run(recipe)
    model = AutoModelForCausalLM.from_pretrained(pico.model)
    tokenizer = AutoTokenizer.from_pretrained(pico.model)
    text = CorpusSpec(**recipe["domain"]["medical"])
    statistics = secateur.calibrate(model, tokenizer, {"medical": text, "general": pico.general}, **recipe["calibrate"])
    plan = secateur.plan(model, statistics, budget={"channels": 0.25})
    assert result.plan is not None and result.evaluation is not None
    assert plan.layers == result.plan.layers
    assert list(plan.calibrated_on) == ["medical"]
    score = secateur.evaluate(
        secateur.shrink(model, plan), tokenizer, text, exclude=statistics, max_tokens=768, block_size=64
    )
    assert score.nll_per_token == pytest.approx(
        result.evaluation.models["pruned"].text["medical"].nll_per_token, rel=1e-5
    )


def test_the_given_model_is_left_alone(model: Any, tokenizer: Any, texts: list[str], statistics: Statistics) -> None:
    """No stage changes a weight, a configuration value, a hook or the mode of parameters."""
    before = fingerprint_loaded(model)
    config = model.config.to_dict()
    secateur.calibrate(model, tokenizer, texts, **SMALL)
    plan = secateur.plan(model, statistics, budget={"channels": 0.25, "groups": 0.25}, shape="uneven")
    secateur.shrink(model, plan)
    secateur.evaluate(model, tokenizer, texts, **SMALL)
    assert fingerprint_loaded(model) == before
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_the_smaller_model_shares_no_memory_with_the_given_one(model: Any, statistics: Statistics, shape: str) -> None:
    """Training one does not change the other, also in the parts that were not cut; a tied head stays tied."""
    smaller = secateur.shrink(model, secateur.plan(model, statistics, shape=shape, budget={"channels": 0.5}))
    theirs = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    ours = {value.untyped_storage().data_ptr() for value in (*smaller.parameters(), *smaller.buffers())}
    assert not theirs & ours
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    before = fingerprint_loaded(model)
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    ids = torch.arange(12)[None]
    smaller(ids, labels=ids).loss.backward()
    optimizer.step()
    assert fingerprint_loaded(model) == before


def test_every_budget_a_recipe_knows_can_be_given(model: Any, statistics: Statistics) -> None:
    """Shares, parameters, bytes as a number or in words, and thresholds by name."""
    size = 4 * model.num_parameters()
    for budget, prune in [
        ({"groups": 0.5}, {}),
        ({"channels": 0.25, "groups": 0.5}, {}),
        ({"parameters": 0.1}, {}),
        ({"bytes": size - 40_000}, {}),
        ({"bytes": "300 kB"}, {"shape": "uneven"}),
        ({"threshold": 1e9}, {"shape": "uneven", "options": {"at": "linear"}}),
    ]:
        plan: Plan = secateur.plan(model, statistics, budget=budget, **prune)
        assert plan.total_pruned < plan.total_dense
    by_name = secateur.plan(model, statistics, budget={"threshold": "aggressive"}, shape="uneven", method="random")
    assert by_name.budget == {"threshold": 0.1}
    assert secateur.plan(model, statistics).budget == {"channels": 0.1}


def test_evaluation_never_measures_what_was_calibrated_on(
    model: Any, tokenizer: Any, texts: list[str], statistics: Statistics
) -> None:
    """Not even when the caller asks for the calibration split itself."""
    seen = set(statistics.buckets["domain"].documents.tolist())
    assert seen <= {document_hash(text) for text in texts}
    score = secateur.evaluate(
        model, tokenizer, texts, exclude=statistics, split="calibration", block_size=64, max_tokens=None
    )
    assert score.num_excluded == len(seen)
    both = secateur.evaluate(model, tokenizer, texts, split="calibration", block_size=64, max_tokens=None)
    assert both.num_documents == score.num_documents + len(seen)


def test_buckets_are_judged_together_but_for_the_general_one(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """``general`` is measured and never decides, unless it is asked for or alone."""
    named = {"a": texts[:200], "b": texts[200:], "general": general_paragraphs(200, seed=9)}
    statistics = secateur.calibrate(model, tokenizer, named, **SMALL)
    assert list(secateur.plan(model, statistics).calibrated_on) == ["a", "b"]
    assert list(secateur.plan(model, statistics, buckets=["general"]).calibrated_on) == ["general"]
    alone = secateur.calibrate(model, tokenizer, {"general": texts}, **SMALL)
    assert list(secateur.plan(model, alone).calibrated_on) == ["general"]
    with pytest.raises(ConfigError, match="unknown bucket 'c'"):
        secateur.plan(model, statistics, buckets=["c"])


def test_mistakes_are_our_errors(model: Any, tokenizer: Any, statistics: Statistics) -> None:
    """Options, methods, text and plans of another model are refused in words."""
    with pytest.raises(ConfigError, match=r"unknown key at prune\.shap.*Did you mean 'shape'"):
        secateur.plan(model, statistics, shap="uneven")
    with pytest.raises(ConfigError, match="Did you mean 'contextual'"):
        secateur.plan(model, statistics, method="contextuel")
    with pytest.raises(CorpusError, match="one block needs 512"):
        secateur.calibrate(model, tokenizer, [f"short {number}" for number in range(50)])
    with pytest.raises(CorpusError, match="does not exist"):
        secateur.calibrate(model, tokenizer, Path("nowhere.txt"))
    for other in ({"num_hidden_layers": 3}, {"intermediate_size": 80}):
        with pytest.raises(PlanError, match=r"taken on another model \(llama, 2 layers\)\. Calibrate this one"):
            secateur.plan(random_model(len(tokenizer), **other), statistics)
    plan = secateur.plan(model, statistics)
    with pytest.raises(PlanError, match="Plan again"):
        secateur.shrink(random_model(len(tokenizer), intermediate_size=80), plan)
    gpt2 = random_model(64, model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=32)
    with pytest.raises(PlanError, match="the plan is for a llama model; this is a gpt2 model"):
        secateur.shrink(gpt2, plan)


# -- run -------------------------------------------------------------------------------------------------------------

MINIMAL = {"model": "m", "domain": {"d": "t.txt"}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What the pipeline was asked for, instead of doing it."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def remember(recipe: Any, **options: Any) -> pipeline.RunResult:
        calls.append((recipe, options))
        return pipeline.RunResult(Path(recipe.output))

    monkeypatch.setattr(pipeline, "run", remember)
    return calls


def test_a_recipe_can_be_given_in_any_form(asked: list[tuple[Any, dict[str, Any]]], tmp_path: Path) -> None:
    """A record, plain data and a file mean the same, with and without something that wins over it."""
    file = tmp_path / "r.yml"
    file.write_text("model: m\ndomain: {d: t.txt}\n")
    for recipe in (MINIMAL, parse_recipe(MINIMAL), file, str(file)):
        secateur.run(recipe)
        secateur.run(recipe, output="runs/b", until="plan")
    for (plain, options), (changed, more) in zip(asked[::2], asked[1::2], strict=True):
        assert plain == load_recipe(file)
        assert options["until"] == "evaluate" and more["until"] == "plan"
        assert changed == parse_recipe({**MINIMAL, "output": "runs/b"})


def test_no_limit_in_a_recipe_stays_no_limit(asked: list[tuple[Any, dict[str, Any]]]) -> None:
    """A null that was asked for is not replaced by the default."""
    recipe = parse_recipe({**MINIMAL, "calibrate": {"max_tokens": None}, "evaluate": {"max_tokens": None}})
    secateur.run(recipe)
    secateur.run(recipe, output="runs/b")
    for found, _ in asked:
        assert found.calibrate.max_tokens is None and found.evaluate.max_tokens is None


def test_unknown_overrides_and_stages_are_refused() -> None:
    """Before anything is touched."""
    with pytest.raises(ConfigError, match="Did you mean 'output'"):
        secateur.run(MINIMAL, outptu="runs/b")
    unchecked = inspect.unwrap(pipeline.run)  # here the annotation would refuse it first
    with pytest.raises(ConfigError, match=r"unknown stage 'shrnk'\. Did you mean 'shrink'"):
        unchecked(parse_recipe(MINIMAL), until="shrnk")  # type: ignore[arg-type]
