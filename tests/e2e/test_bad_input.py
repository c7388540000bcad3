"""What a person can get wrong: each is answered with exit code 2, a message that helps, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.command import Answer, call, replace_in
from tests.pico import Pico, medical_records, save_model_folder, write_records, write_yaml

PROMPT = "Question: {question}\nAnswer: {answer}"


@dataclass
class Attempt:
    """One call of ``secateur run`` that is going to fail; a case changes it before.

    Attributes:
        pico: the project, which is fine.
        folder: an empty folder for the case's own files.
        output: where the run would go.
        changes: top-level recipe keys.
        arguments: further command line arguments.
    """

    pico: Pico
    folder: Path
    output: Path
    changes: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)

    def model(self, **options: Any) -> Path:
        """Use a model of the case's own, and return its folder."""
        folder = save_model_folder(self.folder / "own-model", **options)
        self.changes["model"] = str(folder)
        return folder

    def edit_config(self, **changes: Any) -> Path:
        """Use a model whose config.json has other values, and return its folder."""
        folder = self.model()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    def bring_code(self, **changes: Any) -> None:
        """Use a model that brings Python code, which must not run, and has other values in config.json."""
        own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        folder = self.edit_config(auto_map=own, **changes)
        (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")

    def edit_weights(self, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Use a model whose tensors were changed in place by ``edit``."""
        file = self.model() / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def domain(self, content: str | bytes, name: str = "own.jsonl", **spec: Any) -> Path:
        """Use a corpus file of the case's own, and return its path."""
        file = self.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.changes["domain"] = {"medical": {"path": str(file), **spec}}
        return file

    def prune(self, **prune: Any) -> None:
        """Use another ``prune`` section."""
        self.changes["prune"] = prune


Case = Callable[[Attempt], object]
CASES: dict[str, tuple[Case, list[str]]] = {}


def case(*words: str) -> Callable[[Case], Case]:
    """Register a case and the words its message must have."""

    def register(function: Case) -> Case:
        CASES[function.__name__.lstrip("_")] = (function, list(words))
        return function

    return register


# -- recipe and options ----------------------------------------------------------------------------------------------


@case("unknown key at calibration", "Did you mean 'calibrate'?", "prune")
def _unknown_recipe_key(attempt: Attempt) -> None:
    attempt.changes["calibration"] = {"max_tokens": 100}


@case("unknown key at prune.budget.chanels", "Did you mean 'channels'?")
def _unknown_budget_key(attempt: Attempt) -> None:
    attempt.prune(budget={"chanels": 0.1})


@case("'prune.seed'", "write key=value")
def _set_without_equals(attempt: Attempt) -> None:
    attempt.arguments += ["--set", "prune.seed"]


@case("'channels'", "write key=value")
def _budget_without_equals(attempt: Attempt) -> None:
    attempt.arguments += ["--budget", "channels"]


@case("No such option", "--budgets", "--budget")
def _unknown_option_of_the_command(attempt: Attempt) -> None:
    attempt.arguments += ["--budgets", "channels=0.1"]


@case("unknown method 'contextaul'", "Did you mean 'contextual'?", "magnitude")
def _unknown_method(attempt: Attempt) -> None:
    attempt.prune(method="contextaul")


@case("unknown option of method contextual 'att'", "Did you mean 'at'?")
def _unknown_method_option(attempt: Attempt) -> None:
    attempt.prune(options={"att": "linear"})


@case("at", "'liner'", "Did you mean 'linear'?", "activation")
def _unknown_method_option_value(attempt: Attempt) -> None:
    attempt.prune(options={"at": "liner"})


@case("magnitude has no options", "'at'")
def _option_of_a_method_without_options(attempt: Attempt) -> None:
    attempt.prune(method="magnitude", options={"at": "linear"})


@case("prune.buckets", "'medcal'", "Did you mean 'medical'?", "general")
def _unknown_pruning_bucket(attempt: Attempt) -> None:
    attempt.prune(buckets=["medcal"])


@case("calibrate.buckets", "'law'", "medical")
def _unknown_calibration_bucket(attempt: Attempt) -> None:
    attempt.changes["calibrate"] = {"buckets": ["law"]}


@case("prune.buckets names medical, which calibrate.buckets leaves out")
def _bucket_to_judge_by_is_not_calibrated(attempt: Attempt) -> None:
    attempt.changes["calibrate"] = {"buckets": ["general"]}


@case("device 'abacus'", "Try device: auto or cpu")
def _unknown_device(attempt: Attempt) -> None:
    attempt.changes["device"] = "abacus"


@case("device 'cuda:63'", "Try device: auto or cpu")
def _absent_device(attempt: Attempt) -> None:
    attempt.changes["device"] = "cuda:63"


@case("device 'meta'", "Try device: auto or cpu")
def _device_without_memory(attempt: Attempt) -> None:
    attempt.changes["device"] = "meta"


@case("dtype", "'int8'", "bfloat16")
def _unknown_dtype(attempt: Attempt) -> None:
    attempt.changes["dtype"] = "int8"


# -- text ------------------------------------------------------------------------------------------------------------


@case("corpus path", "medcal.jsonl does not exist", "Did you mean", "medical.jsonl")
def _missing_corpus(attempt: Attempt) -> None:
    attempt.changes["domain"] = {"medical": str(attempt.pico.domain.with_name("medcal.jsonl"))}


@case("corpus 'medical' is empty", "Give files or records with text")
def _empty_corpus(attempt: Attempt) -> None:
    attempt.domain("")


@case("calibration text of corpus 'medical' has", "one block needs 64", "calibrate.block_size")
def _corpus_too_small_for_one_block(attempt: Attempt) -> None:
    attempt.domain("".join(json.dumps({"text": f"note {number}"}) + "\n" for number in range(12)))


@case("2 documents gave 0 for split", "give more text or set splits")
def _too_few_documents_for_three_splits(attempt: Attempt) -> None:
    attempt.domain("".join(json.dumps({"text": f"{number} " + "pain " * 400}) + "\n" for number in range(2)))


@case("test", "20 were excluded", "give more text")
def _every_test_document_was_calibrated_on(attempt: Attempt) -> None:
    file = write_records(attempt.folder / "both.jsonl", medical_records(20))
    attempt.changes["domain"] = {"medical": {"calibration": str(file), "test": str(file), "text": PROMPT}}


@case("line 1 has no field 'qestion'", "Did you mean 'question'?", "question, answer", "Correct text:")
def _template_names_a_missing_field(attempt: Attempt) -> None:
    attempt.changes["domain"] = {"medical": {"path": str(attempt.pico.domain), "text": "{qestion}"}}


@case("own.jsonl, line 2: byte 0xe9 at offset", "not utf-8", "latin-1", "errors: replace")
def _undecodable_bytes(attempt: Attempt) -> None:
    attempt.domain(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')


@case("max_tokens 32 is less than one block of 64", "calibrate.max_tokens")
def _less_than_one_block_asked_for(attempt: Attempt) -> None:
    attempt.changes["calibrate"] = {"max_tokens": 32, "block_size": 64}


@case("max_tokens 32 is less than one block of 64", "evaluate.max_tokens")
def _less_than_one_test_block_asked_for(attempt: Attempt) -> None:
    attempt.changes["evaluate"] = {"max_tokens": 32}


# -- models ----------------------------------------------------------------------------------------------------------


@case("model folder ./nowhere does not exist", "Give a local folder, a .gguf file or a hub id")
def _missing_model_folder(attempt: Attempt) -> None:
    attempt.changes["model"] = "./nowhere"


@case("is a file", "give its folder")
def _model_is_a_file(attempt: Attempt) -> None:
    attempt.changes["model"] = str(attempt.pico.general)


@case("nowhere.gguf does not exist")
def _missing_gguf_file(attempt: Attempt) -> None:
    attempt.changes["model"] = "nowhere.gguf"


@case("broken.gguf could not be read", "Check the file")
def _broken_gguf_file(attempt: Attempt) -> None:
    file = attempt.folder / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    attempt.changes["model"] = str(file)


@case("unknown model type 'bert'", "Known:", "llama", "qwen3")
def _unsupported_model_type(attempt: Attempt) -> None:
    attempt.edit_config(model_type="bert")


@case("no config.json", "it holds", "model.safetensors")
def _missing_config(attempt: Attempt) -> None:
    (attempt.model() / "config.json").unlink()


@case("config.json is not valid JSON", "Fetch the model again")
def _broken_config(attempt: Attempt) -> None:
    (attempt.model() / "config.json").write_text('{"model_type": "llama",')


@case("config.json", "hidden_size", "'wide'")
def _configuration_of_the_wrong_kind(attempt: Attempt) -> None:
    attempt.edit_config(hidden_size="wide")


@case("config.json", "64", "7", "multiple of the number of attention heads")
def _configuration_that_contradicts_itself(attempt: Attempt) -> None:
    attempt.edit_config(num_attention_heads=7, num_key_value_heads=7)


@case("mlp.gate_proj.weight with shape (96, 64)", "config.json says (80, 64)")
def _configuration_of_another_model(attempt: Attempt) -> None:
    attempt.edit_config(intermediate_size=80)


@case("lacks weights", "model.layers.2.", "incomplete")
def _missing_weights(attempt: Attempt) -> None:
    attempt.edit_config(num_hidden_layers=3)


@case("only as pickle (pytorch_model.bin)", "can run code", "Convert it to safetensors")
def _pickled_weights(attempt: Attempt) -> None:
    folder = attempt.model()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


@case("no .safetensors file", "Fetch its weights")
def _no_weights(attempt: Attempt) -> None:
    (attempt.model() / "model.safetensors").unlink()


@case("model.safetensors is not a readable safetensors file", "bytes where its header says", "Fetch it again")
def _truncated_weights(attempt: Attempt) -> None:
    file = attempt.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@case("model.safetensors is not a readable safetensors file", "header is longer than the file", "Fetch it again")
def _truncated_header(attempt: Attempt) -> None:
    file = attempt.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@case("stored as I8", "unquantised")
def _quantised_weights(attempt: Attempt) -> None:
    attempt.edit_weights(lambda t: t.update({name: tensor.to(torch.int8) for name, tensor in t.items()}))


@case("needs its own Python code", "trust_remote_code: true")
def _model_with_its_own_code(attempt: Attempt) -> None:
    attempt.bring_code(model_type="own")


@case("weights of model.layers.1.mlp.up_proj.weight hold NaN", "fetch it again")
def _nan_in_the_weights(attempt: Attempt) -> None:
    attempt.edit_weights(lambda t: t["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(float("nan")))


@case("activations at the input of model.layers.1.mlp.down_proj", "not finite", "dtype: float32")
def _activations_overflow(attempt: Attempt) -> None:
    attempt.edit_weights(lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1e38))


@case("logits are not finite", "Check the checkpoint")
def _logits_overflow(attempt: Attempt) -> None:
    attempt.edit_weights(lambda t: t["model.norm.weight"].mul_(2e38))


@case("tokenizer", "could not be loaded", "tokenizer.json")
def _missing_tokenizer(attempt: Attempt) -> None:
    for file in attempt.model().glob("tokenizer*"):
        file.unlink()


@case("gives token id", "the model knows 300 tokens", "different models")
def _tokenizer_of_another_model(attempt: Attempt) -> None:
    attempt.model(vocab_size=300)


@case("'not a name!'", "neither an existing folder nor a hub id")
def _impossible_hub_id(attempt: Attempt) -> None:
    attempt.changes["model"] = "not a name!"


# -- budgets ---------------------------------------------------------------------------------------------------------


def ratio_case(ratio: object, *words: str) -> None:
    """Register a case for one impossible share of channels."""

    def ratio_is_impossible(attempt: Attempt) -> None:
        attempt.prune(budget={"channels": ratio})

    CASES[f"ratio {ratio}"] = (ratio_is_impossible, ["prune.budget.channels", f"got {ratio!r}", *words])


ratio_case(0, "greater than 0")
ratio_case(1, "less than 1")
ratio_case(1.5, "less than 1")
ratio_case(-0.1, "greater than 0")
ratio_case("most", "number")


@case("0.001 of 96 ffn_channels rounds to none", "Allowed counts", "95 (ratio 0.01042)")
def _ratio_rounds_to_nothing(attempt: Attempt) -> None:
    attempt.prune(budget={"channels": 0.001})


@case("0.999 of 96 ffn_channels leaves none", "Allowed counts")
def _ratio_leaves_nothing(attempt: Attempt) -> None:
    attempt.prune(budget={"channels": 0.999})


@case("removes 182 ffn_channels", "at most 172 of 192", "prune.min_keep_ratio")
def _uneven_ratio_leaves_too_little(attempt: Attempt) -> None:
    attempt.prune(budget={"channels": 0.95}, shape="uneven")


@case("the units that may be cut (ffn_channel) own 36,864", "add unit kinds")
def _more_parameters_than_the_units_have(attempt: Attempt) -> None:
    attempt.prune(budget={"parameters": 0.9})


@case("already takes 349,440 bytes", "1,000,000,000", "smaller target")
def _more_bytes_than_the_model_has(attempt: Attempt) -> None:
    attempt.prune(budget={"bytes": "1GB"})


@case("'400 apples'", "400MB")
def _bytes_in_an_unknown_unit(attempt: Attempt) -> None:
    attempt.prune(budget={"bytes": "400 apples"})


@case("leaves 3 per layer", "configuration refuses", "2 (ratio 0.5), 1 (ratio 0.75)", "shape: uneven")
def _head_count_that_the_configuration_refuses(attempt: Attempt) -> None:
    attempt.prune(budget={"groups": 0.25})


@case("gqa_groups of a opt model cannot be cut", "Use units: [ffn_channel]")
def _family_whose_heads_are_fixed(attempt: Attempt) -> None:
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2}
    attempt.model(model_type="opt", num_attention_heads=6, max_position_embeddings=256, **sizes)
    attempt.prune(budget={"groups": 0.5})


@case("at: linear is defined for ffn_channel and shared_channel only", "gqa_group", "at: activation")
def _method_option_that_does_not_fit_the_units(attempt: Attempt) -> None:
    attempt.prune(options={"at": "linear"}, budget={"groups": 0.5})


@case("threshold 0 removes no ffn_channel", "Raise the threshold")
def _threshold_below_every_score(attempt: Attempt) -> None:
    attempt.prune(budget={"threshold": 0})


# -- output ----------------------------------------------------------------------------------------------------------


@case("is a file", "Choose another output folder")
def _output_is_a_file(attempt: Attempt) -> None:
    attempt.changes["output"] = str(attempt.pico.general)


@case("cannot be written", "Choose another output")
def _output_below_a_file(attempt: Attempt) -> None:
    attempt.changes["output"] = str(attempt.pico.general / "run")


# -- running them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def attempt(pico: Pico, tmp_path: Path) -> Attempt:
    """An attempt that would succeed as it is."""
    folder = tmp_path / "case"
    folder.mkdir()
    return Attempt(pico, folder, tmp_path / "run")


def try_it(attempt: Attempt, capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "run") -> Answer:
    """Return the answer to an attempt."""
    recipe = write_yaml(attempt.folder / "recipe.yml", {**attempt.pico.recipe(attempt.output), **attempt.changes})
    return call(capsys, command, recipe, "--quiet", *attempt.arguments, *arguments)


def expect_refusal(answer: Answer, *words: str) -> None:
    """Check exit code, words, and that message and JSON say the same without a traceback."""
    assert answer.code == 2, (answer.out, answer.err)
    for word in words:
        assert word in answer.err
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.out + answer.err
    error = answer.json()["error"]
    assert error["message"] in answer.err
    assert error["type"].endswith(("Error", "Option", "Parameter"))


def expect_nothing_half_written(output: Path) -> None:
    """Check that no model and no temporary file is there."""
    assert not (output / "model").exists()
    assert list(output.rglob(".*")) == []


KNOWN_LATE = {
    "missing_weights",
    "nan_in_the_weights",
    "activations_overflow",
    "logits_overflow",
    "threshold_below_every_score",
}
"""What shows only once weights are loaded or text was run."""


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_words_and_leaves_nothing_half_written(
    name: str, attempt: Attempt, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, what was received and what to do, no traceback, no half-written result.

    What can be known beforehand is said beforehand: no weights are loaded and no output folder appears.
    """
    prepare, words = CASES[name]
    prepare(attempt)
    if name not in KNOWN_LATE:
        monkeypatch.setattr("secateur.pipeline.inputs.load_model", None)
    answer = try_it(attempt, capsys, "--json")
    expect_refusal(answer, *words)
    expect_nothing_half_written(attempt.output)
    assert name in KNOWN_LATE or not attempt.output.exists()


def test_the_attempt_itself_is_fine(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a mistake the attempt succeeds, so each case fails for its own reason."""
    assert try_it(attempt, capsys).code == 0


def test_errors_replace_makes_undecodable_text_usable(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """The way out that the message names works."""
    records = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in medical_records(300))
    attempt.domain(records.encode().replace(b"pain", b"p\xe9in"), errors="replace", text=PROMPT)
    answer = try_it(attempt, capsys)
    assert answer.code == 0, answer.err


def test_code_beside_a_supported_model_is_not_run(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that transformers knows is loaded with transformers' own code, whatever else lies in the folder."""
    attempt.bring_code()
    answer = try_it(attempt, capsys)
    assert answer.code == 0, answer.err


def test_a_missing_recipe_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is named, and where examples are."""
    answer = call(capsys, "run", tmp_path / "no.yml", "--json")
    expect_refusal(answer, "no.yml does not exist", "examples/", "secateur demo")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_no_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file and the line are named."""
    (tmp_path / "r.yml").write_text("model: [\n")
    expect_refusal(call(capsys, "run", tmp_path / "r.yml", "--json"), "r.yml is not valid YAML", "line 2")


def test_without_a_network_a_hub_model_is_unavailable(
    attempt: Attempt, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, a hub id that is not cached says so, with what else could be given."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(attempt.folder / "hub"))
    attempt.changes["model"] = "nobody/nothing"
    answer = try_it(attempt, capsys, "--json")
    expect_refusal(answer, "model nobody/nothing is not a local folder", "not in the hub cache", "give a local folder")
    assert answer.json()["error"]["type"] == "UnavailableError"
    assert not attempt.output.exists()


def test_a_foreign_folder_is_left_alone(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with somebody's files in it is no output; the files stay as they are."""
    attempt.output.mkdir()
    (attempt.output / "thesis.tex").write_text("years of work")
    answer = try_it(attempt, capsys, "--json")
    expect_refusal(answer, "not empty and is not a run of secateur", "thesis.tex", "Choose another output")
    assert [(file.name, file.read_text()) for file in attempt.output.iterdir()] == [("thesis.tex", "years of work")]


# -- results that were damaged ---------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[str, bytes, list[str]]] = {
    "statistics": ("statistics/medical.safetensors", b"\0" * 50, ["statistics/medical.safetensors", "Delete it"]),
    "statistics, JSON": ("statistics/medical.json", b"{", ["statistics/medical.json", "Delete it"]),
    "statistics of another version": ("statistics/medical.json", b"{}", ["another version", "calibrate again"]),
    "plan": ("plan.json", b"{", ["plan.json cannot be read", "Delete it; it will be made again"]),
    "plan without layers": ("plan.json", b'{"schema_version": 3}', ["not a plan that secateur wrote", "Plan again"]),
    "evaluation": ("evaluation.json", b"[]", ["evaluation.json", "Delete it"]),
    "evaluation without models": ("evaluation.json", b"{}", ["evaluation.json", "Delete it"]),
}


@pytest.mark.parametrize(("name", "content", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_result_is_named_and_can_be_made_again(
    copied: Path,
    attempt: Attempt,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    words: list[str],
) -> None:
    """The message names the file and says to delete it; after that the same command works."""
    attempt.output = copied
    (copied / name).write_bytes(content)
    expect_refusal(try_it(attempt, capsys, "--json"), *words)
    (copied / name).unlink()
    answer = try_it(attempt, capsys)
    assert answer.code == 0, answer.err


def test_a_damaged_manifest_costs_only_time(copied: Path, attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a readable manifest nothing is known to be valid, so everything is made again."""
    attempt.output = copied
    (copied / "manifest.json").write_text("{")
    answer = try_it(attempt, capsys, "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["reused"] == []


PLAN_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "a unit that is not there": (lambda layer: layer.update(keep="0-96"), ["between 0 and 95", "Plan the model again"]),
    "no unit": (lambda layer: layer.update(keep=""), ["takes a sub-layer out", "set shape to uneven"]),
    "not a list of units": (lambda layer: layer.update(keep="some"), ["'some'", "0-4 6 9-11"]),
    "not in order": (lambda layer: layer.update(keep="5 3"), ["ascending"]),
    "another width": (lambda layer: layer.update(keep="0-9"), ["uniform", "set shape to uneven"]),
    "another model": (lambda layer: layer.update(num_units=97), ["expects ffn_channel counts", "Plan again"]),
}


@pytest.mark.parametrize(("edit", "words"), PLAN_EDITS.values(), ids=PLAN_EDITS)
def test_a_plan_that_was_edited_wrongly_is_refused(
    copied: Path,
    attempt: Attempt,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[dict[str, Any]], Any],
    words: list[str],
) -> None:
    """A person's slip in plan.json is named, and the earlier model stays."""
    attempt.output = copied
    data = json.loads((copied / "plan.json").read_text())
    edit(data["layers"]["ffn_channel"][0])
    (copied / "plan.json").write_text(json.dumps(data))
    expect_refusal(try_it(attempt, capsys, "--json"), *words)
    assert (copied / "model" / "model.safetensors").is_file()


def test_a_plan_edited_to_a_head_count_the_configuration_refuses(
    attempt: Attempt, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uniform plans must fit the stock configuration also when a person chose the units."""
    attempt.prune(budget={"groups": 0.5})
    attempt.arguments = ["--set", "evaluate.controls=[]"]
    assert try_it(attempt, capsys).code == 0
    file = attempt.output / "plan.json"
    data = json.loads(file.read_text())
    for layer in data["layers"]["gqa_group"]:
        layer["keep"] = "0-2"
    file.write_text(json.dumps(data))
    expect_refusal(try_it(attempt, capsys, "--json"), "keeps 3 gqa_groups per layer", "[4, 2, 1]", "shape to uneven")


# -- a full disk -----------------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> Any:
    """Stand in for a write to a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_safetensors(*_: Any, **__: Any) -> Any:
    """Stand in for the same, as the safetensors library says it."""
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "writer", "named"),
    [
        ("secateur.store.artifacts.replacing", no_space, "manifest.json"),
        ("secateur.store.artifacts.save", no_space_in_safetensors, "medical.safetensors"),
        ("secateur.export.huggingface.save_model", no_space, "model"),
        ("secateur.export.huggingface.save_model", no_space_in_safetensors, "model"),
        ("secateur.export.huggingface.copy_side_files", no_space, "model"),
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    attempt: Attempt,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    writer: Callable[..., Any],
    named: str,
) -> None:
    """Whichever file did not fit is named; with space again, the same command succeeds."""
    with monkeypatch.context() as patch:
        replace_in(patch, place, writer)
        answer = try_it(attempt, capsys, "--json", command="shrink")
    expect_refusal(answer, "the disk is full", named, "Free space, or choose another output")
    expect_nothing_half_written(attempt.output)
    assert try_it(attempt, capsys, command="shrink").code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(small_disk: Path, attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """The model does not fit: the message says so, no part of it stays, and the earlier stages are kept."""
    attempt.output = small_disk / "run"
    expect_refusal(try_it(attempt, capsys, "--json"), "the disk is full", "Free space")
    expect_nothing_half_written(attempt.output)
    assert (attempt.output / "plan.json").is_file()
