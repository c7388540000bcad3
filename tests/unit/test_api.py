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
from tests.pico import Pico, build_pico, general_paragraphs, medical_records, pico_tokenizer, random_model

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
    both = {"budget": {"channels": 0.25}, "buckets": ["medical", "general"]}
    union = secateur.plan(model, statistics, **both, combine="union")
    asked = secateur.run({**recipe, "prune": {**both, "combine": "union"}}, until="plan").plan
    assert asked is not None and asked.layers == union.layers != secateur.plan(model, statistics, **both).layers
    assert union.notes == asked.notes and "medical, general one by one" in " ".join(union.notes)
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
        assert options["until"] == "export" and more["until"] == "plan"
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


# -- mixtures, Gram matrices, reconstruction ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_grams(tokenizer: Any, texts: list[str]) -> Statistics:
    """Statistics of two buckets with Gram matrices of all units."""
    named = {"medical": [str(record) for record in medical_records(300)], "general": texts}
    return secateur.calibrate(random_model(len(tokenizer)), tokenizer, named, grams=True, **SMALL)


def test_a_mixture_weighs_the_buckets(model: Any, with_grams: Statistics) -> None:
    """Weights of any scale; one bucket is that bucket; the plan records the shares; the text's length is no matter."""
    alone = secateur.plan(model, with_grams, mix={"medical": 7})
    assert alone.layers == secateur.plan(model, with_grams, buckets=["medical"]).layers
    mixtures = ({"medical": 4, "general": 1}, {"general": 0.9, "medical": 0.1})
    plans = [secateur.plan(model, with_grams, mix=mix) for mix in mixtures]
    assert plans[0].mix == {"medical": 0.8, "general": 0.2} and list(plans[0].calibrated_on) == ["medical", "general"]
    assert plans[0].layers != plans[1].layers
    assert plans[0].calibration_tokens == sum(bucket.num_tokens for bucket in with_grams.buckets.values())
    assert Plan.from_dict(plans[0].to_dict()) == plans[0]


def test_a_mixture_is_refused_in_words(model: Any, with_grams: Statistics) -> None:
    """Unknown buckets, buckets beside it, weights that are none."""
    with pytest.raises(ConfigError, match=r"mix: unknown bucket 'medcal'\. Did you mean 'medical'"):
        secateur.plan(model, with_grams, mix={"medcal": 1})
    with pytest.raises(ConfigError, match="both buckets and mix say which text decides"):
        secateur.plan(model, with_grams, mix={"medical": 1}, buckets=["general"])
    with pytest.raises(ConfigError, match=r"prune\.mix\.general: input should be greater than 0"):
        secateur.plan(model, with_grams, mix={"medical": 1, "general": 0})


def test_blocks_cannot_be_measured_without_text(model: Any, with_grams: Statistics) -> None:
    """Statistics hold none; the way that has text is named."""
    asked = {"units": ["layer"], "budget": {"layers": 0.5}}
    assert secateur.plan(model, with_grams, **asked).removed_layers
    with pytest.raises(ConfigError, match=r"method perplexity_drop takes blocks out one after another.*Use a recipe"):
        secateur.plan(model, with_grams, depth_method="perplexity_drop", **asked)


def test_the_vocabulary_counts_domain_text_whatever_the_mixture(
    model: Any, tokenizer: Any, with_grams: Statistics
) -> None:
    """The general text weighs in where channels are chosen; its tokens are kept only where the domain uses them."""
    options = {"vocabulary": {"min_count": 1, "multiple_of": 1}, "tokenizer": tokenizer, "budget": {"channels": 0.25}}
    options["units"] = ["ffn_channel", "vocabulary"]
    mixed = secateur.plan(model, with_grams, mix={"medical": 1, "general": 1}, **options)
    domain = secateur.plan(model, with_grams, **options)
    assert mixed.vocabulary == domain.vocabulary
    assert mixed.layers != domain.layers


def test_methods_that_read_gram_matrices_use_them(model: Any, with_grams: Statistics) -> None:
    """And with a mixture, those of the mixture."""
    plans = [secateur.plan(model, with_grams, method="obs", **which) for which in
             ({}, {"buckets": ["general"]}, {"mix": {"medical": 0.5, "general": 0.5}})]  # fmt: skip
    assert len({str(plan.layers) for plan in plans}) == 3


def test_reconstruction_is_that_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text, mixture and options give the same weights, through the recipe and through the functions."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    pico: Pico = build_pico(tmp_path)
    mix = {"medical": 0.7, "general": 0.3}
    prune = {"method": "obs", "budget": {"channels": 0.5}, "mix": mix}
    recipe = pico.recipe(tmp_path / "run", prune={**prune, "reconstruct": "dense"})
    result = secateur.run(recipe, until="shrink")
    model = AutoModelForCausalLM.from_pretrained(pico.model)
    tokenizer = AutoTokenizer.from_pretrained(pico.model)
    text = {"medical": CorpusSpec(**recipe["domain"]["medical"]), "general": pico.general}
    statistics = secateur.calibrate(model, tokenizer, text, grams="ffn_channel", **recipe["calibrate"])
    plan = secateur.plan(model, statistics, **prune)
    assert result.plan is not None
    assert (plan.layers, plan.mix) == (result.plan.layers, result.plan.mix)
    plain, fitted = (secateur.shrink(model, plan, reconstruct=given) for given in (None, statistics))
    expected = AutoModelForCausalLM.from_pretrained(result.model_folder).state_dict()
    for name, tensor in fitted.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    changed = {name for name, tensor in plain.state_dict().items() if not tensor.equal(fitted.state_dict()[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}


def test_reconstruction_helps_on_text_that_was_not_fitted(
    model: Any, tokenizer: Any, texts: list[str], with_grams: Statistics
) -> None:
    """Held-out logits come nearer to the dense model's; the given model is left alone."""
    before = fingerprint_loaded(model)
    plan = secateur.plan(
        model, with_grams, buckets=["general"], budget={"channels": 0.5, "groups": 0.25}, shape="uneven"
    )
    ids = torch.tensor([tokenizer(" ".join(general_paragraphs(20, seed=9)))["input_ids"][:256]])
    distance = []
    for given in (None, with_grams):
        smaller = secateur.shrink(model, plan, reconstruct=given)
        with torch.inference_mode():
            distance.append(float((smaller(ids).logits - model(ids).logits).square().mean()))
    assert distance[1] < distance[0]
    assert fingerprint_loaded(model) == before


def test_missing_gram_matrices_are_said_with_how_to_get_them(
    model: Any, statistics: Statistics, with_grams: Statistics, tokenizer: Any, texts: list[str]
) -> None:
    """By methods and by the reconstruction, also where only another kind of unit has them."""
    how = r"Take them in the same pass: calibrate\(\.\.\., grams=True\)"
    with pytest.raises(ConfigError, match=rf"method obs needs Gram matrices for the ffn_channels.*{how}"):
        secateur.plan(model, statistics, method="obs")
    plan = secateur.plan(model, statistics)
    with pytest.raises(ConfigError, match=rf"reconstruction needs Gram matrices for the ffn_channels.*{how}"):
        secateur.shrink(model, plan, reconstruct=statistics)
    channels = secateur.calibrate(model, tokenizer, texts, grams=["ffn_channel"], **SMALL)
    with pytest.raises(ConfigError, match="needs Gram matrices for the gqa_groups"):
        secateur.plan(model, channels, method="obs", budget={"groups": 0.25}, shape="uneven")
    with pytest.raises(ConfigError, match=r"unknown kind of unit 'ffn_chanel'\. Did you mean 'ffn_channel'"):
        secateur.calibrate(model, tokenizer, texts, grams="ffn_chanel", **SMALL)
    with pytest.raises(ConfigError, match=r"shrink\(model, plan, reconstruct=statistics\)"):
        secateur.plan(model, with_grams, reconstruct="dense")
    counts = secateur.count_tokens(tokenizer, texts)
    tokens = secateur.plan(model, vocabulary={"min_count": 1}, tokenizer=tokenizer, token_counts=counts)
    with pytest.raises(ConfigError, match="nothing can be reconstructed"):
        secateur.shrink(model, tokens, reconstruct=with_grams)
    with pytest.raises(ConfigError, match="text that the plan was made from: unknown bucket 'domain'"):
        secateur.shrink(model, plan, reconstruct=with_grams)
    other = random_model(len(tokenizer), intermediate_size=80)
    with pytest.raises(PlanError, match="taken on another model"):
        secateur.shrink(other, plan, reconstruct=channels)


def test_too_little_text_for_gram_matrices_is_noted_or_refused(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """A note in the plan below five tokens per channel; below one the pass does not begin."""
    few = secateur.calibrate(model, tokenizer, texts, grams=True, max_tokens=300, block_size=64)
    (note,) = secateur.plan(model, few).notes[-1:]
    assert "has 3.1 calibration tokens per channel (300 tokens for 96 channels)" in note
    groups = secateur.plan(model, few, budget={"groups": 0.25}, shape="uneven")
    assert "has 4.6 calibration tokens per channel (300 tokens for 64 channels)" in groups.notes[-1]
    enough = secateur.calibrate(model, tokenizer, texts, grams=True, max_tokens=480, block_size=64)
    assert not any("per channel" in note for note in secateur.plan(model, enough).notes)
    with pytest.raises(CorpusError, match=r"has 0\.8 calibration tokens per channel"):
        secateur.calibrate(model, tokenizer, texts, grams=True, max_tokens=80, block_size=64)
    without = secateur.calibrate(model, tokenizer, texts, max_tokens=80, block_size=64)
    assert secateur.plan(model, without).notes == secateur.plan(model, without, mix={"domain": 1}).notes


def test_what_judged_a_fit_is_not_measured_on(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """The validation documents behind Gram matrices are excluded like the calibration documents."""
    statistics = secateur.calibrate(model, tokenizer, texts, grams=True, **SMALL)
    used = set(statistics.grams["domain"].documents.tolist())
    assert used and not used & set(statistics.buckets["domain"].documents.tolist())
    options: dict[str, Any] = {"split": "validation", "block_size": 64, "max_tokens": None}
    assert secateur.evaluate(model, tokenizer, texts, exclude=statistics, **options).num_excluded == len(used)


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        ({"allocation": "knapsack", "shape": "uneven"}, "allocation: knapsack"),
        ({"allocation": "search"}, "allocation: search"),
        ({"budget": {"max_domain_loss": 0.1}}, "a bound on the loss"),
        ({"combine": "guard"}, "combine: guard"),
    ],
)
def test_what_is_measured_on_text_cannot_be_planned_from_statistics(
    model: Any, statistics: Statistics, ask: dict[str, Any], what: str
) -> None:
    """Rather than planning something else in silence; the message says what to use."""
    with pytest.raises(ConfigError, match=f"{what} measures pruned models on text.*Use a recipe"):
        secateur.plan(model, statistics, **{"budget": {"channels": 0.25}, **ask})


@pytest.mark.parametrize("allocation", ["log_increase", "block_influence"])
def test_shares_by_a_rule_need_only_statistics(model: Any, statistics: Statistics, allocation: str) -> None:
    """As in a recipe."""
    plan = secateur.plan(model, statistics, budget={"channels": 0.25}, allocation=allocation, shape="uneven")
    kept = [len(layer.keep) for layer in plan.layers["ffn_channel"]]
    total = sum(layer.num_units for layer in plan.layers["ffn_channel"])
    assert sum(kept) == pytest.approx(0.75 * total, abs=2)


# -- recovery --------------------------------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {
    "max_tokens": 2048,
    "block_size": 64,
    "batch_size": 4,
    "evaluations": 2,
    "evaluation_tokens": 512,
    "learning_rate": 1e-3,
    "precision": "float32",
}


def test_recovery_trains_a_copy(model: Any, tokenizer: Any, texts: list[str], statistics: Statistics) -> None:
    """The trained model has the pruned one's shapes and a lower held-out loss; neither model given is touched."""
    plan = secateur.plan(model, statistics, budget={"channels": 0.25})
    smaller = secateur.shrink(model, plan)
    before = fingerprint_loaded(smaller), fingerprint_loaded(model)
    trained, recovery = secateur.recover(smaller, tokenizer, {"towns": texts}, method="finetune", **TRAINING)
    assert (fingerprint_loaded(smaller), fingerprint_loaded(model)) == before
    assert {n: p.shape for n, p in trained.named_parameters()} == {n: p.shape for n, p in smaller.named_parameters()}
    assert recovery.best.losses["towns"] < recovery.points[0].losses["towns"]


def test_the_dense_model_teaches_through_a_smaller_vocabulary(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """With the plan, ids are translated for the teacher; general text is measured and not trained on."""
    counts = secateur.count_tokens(tokenizer, texts)
    plan = secateur.plan(model, vocabulary={"min_count": 1}, tokenizer=tokenizer, token_counts=counts)
    smaller, its_tokenizer = secateur.shrink(model, plan), secateur.shrink_tokenizer(tokenizer, plan)
    both = {"towns": texts, "general": [f"{record['question']} {record['answer']}" for record in medical_records(200)]}
    _, recovery = secateur.recover(smaller, its_tokenizer, both, dense=model, plan=plan, **TRAINING)
    assert recovery.objective == "distill"
    assert set(recovery.points[0].losses) == {"towns", "general"}
    alone = secateur.recover(smaller, its_tokenizer, {"towns": texts}, dense=model, plan=plan, **TRAINING)[1]
    assert alone.tokens == recovery.tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 2}, "rounds needs a whole run"),
        ({"method": "distill"}, "needs the dense model and the plan"),
        ({"learning_rates": 1}, "learning_rate"),
    ],
)
def test_what_recovery_cannot_do_here_is_refused(
    model: Any, tokenizer: Any, texts: list[str], options: dict[str, Any], words: str
) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match=words):
        secateur.recover(model, tokenizer, {"towns": texts}, **options)
