"""Calibration and evaluation by several real processes: the same numbers as by one, and clear ends of broken runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.store.artifacts import read_json
from tests.pico import Pico

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "calibrate": {"max_tokens": 1024, "block_size": 64, "batch_size": 4},
    "evaluate": {"max_tokens": 512, "batch_size": 4, "controls": ["random"]},
}
METHODS: dict[str, dict[str, Any]] = {
    "impacts and Gram matrices": {"method": "cus_prun", "budget": {"channels": 0.25}, "reconstruct": "dense"},
    "gradients": {"method": "taylor", "budget": {"channels": 0.25}},
}


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which a process keeps to one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def command(recipe: Path, stage: str, processes: int, *launcher: str) -> list[str]:
    """Return the command that runs a recipe in so many processes of this machine."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port()]
    return [sys.executable, *(launch if processes > 1 else []), *launcher, "-m", "secateur", stage, str(recipe), "-q"]


def run(recipe: Path, stage: str, processes: int) -> subprocess.CompletedProcess[str]:
    """Run a recipe in so many processes to its end."""
    return subprocess.run(
        command(recipe, stage, processes), env=environment(), capture_output=True, text=True, timeout=300
    )


def write(pico: Pico, folder: Path, name: str, prune: Mapping[str, Any], **changes: Any) -> Path:
    """Write a recipe whose output is a folder of this name."""
    return pico.write_recipe(folder / f"{name}.yml", folder / name, **{**OPTIONS, "prune": dict(prune), **changes})


def assert_same_numbers(first: Path, second: Path) -> None:
    """Two run folders hold the same statistics, evaluation and weights, up to the order of sums."""
    names = sorted(file.name for file in (first / "statistics").glob("*.safetensors"))
    assert names == sorted(file.name for file in (second / "statistics").glob("*.safetensors")) and names
    for name in names:
        tensors = load_file(first / "statistics" / name), load_file(second / "statistics" / name)
        assert tensors[0].keys() == tensors[1].keys()
        for key in tensors[0]:
            torch.testing.assert_close(tensors[1][key], tensors[0][key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    models = [read_json(folder / "evaluation.json")["models"] for folder in (first, second)]
    assert list(models[0]) == list(models[1]) == ["dense", "pruned", "random"]
    for row in models[0]:
        for bucket, score in models[0][row]["text"].items():
            other = models[1][row]["text"][bucket]
            for key in ("document_nll", "nll_per_token", "nll_stderr", "bits_per_byte"):
                assert other[key] == pytest.approx(score[key], rel=1e-4), (row, bucket, key)
            for key in ("document_tokens", "document_bytes", "corpus_fingerprint", "num_documents"):
                assert other[key] == score[key]


@pytest.mark.parametrize("prune", METHODS.values(), ids=METHODS)
def test_one_two_and_three_processes_have_the_same_result(pico: Pico, tmp_path: Path, prune: dict[str, Any]) -> None:
    """Statistics, what goes with them, the plan and every document's loss; only process 0 writes and speaks."""
    for processes in (1, 2, 3):
        done = run(write(pico, tmp_path, str(processes), prune), "run", processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("(reloaded from disk and compared)") == 1
    for processes in (2, 3):
        assert_same_numbers(tmp_path / "1", tmp_path / str(processes))
        kept = [read_json(tmp_path / name / "plan.json")["layers"] for name in ("1", str(processes))]
        assert kept[0] == kept[1]
        assert not (tmp_path / str(processes) / "statistics" / "shares").exists()


def test_two_launch_commands_are_two_machines(pico: Pico, tmp_path: Path) -> None:
    """Each machine starts its own process; they find each other by address, rank and port."""
    recipe, port = write(pico, tmp_path, "both", METHODS["gradients"]), free_port()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), "-m", "secateur", "evaluate", str(recipe), "-q"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert "(reloaded from disk and compared)" in told[0][0] and told[1][0] == ""
    alone = write(pico, tmp_path, "alone", METHODS["gradients"])
    assert run(alone, "evaluate", 1).returncode == 0
    assert_same_numbers(tmp_path / "alone", tmp_path / "both")


def test_more_processes_than_blocks_are_refused(pico: Pico, tmp_path: Path) -> None:
    """Before anything is calibrated; the message says how many may be started."""
    few = {"calibrate": {"max_tokens": 128, "block_size": 64, "batch_size": 4}}
    done = run(write(pico, tmp_path, "few", METHODS["gradients"], **few), "calibrate", 3)
    assert done.returncode != 0
    assert "blocks for 3 processes" in done.stderr and "Start at most 2" in done.stderr
    assert not (tmp_path / "few" / "statistics").exists()


_OTHER = """
import os, sys
from secateur.cli.main import main
sys.exit(main(["calibrate", sys.argv[1 + int(os.environ["RANK"])], "-q"]))
"""


def test_processes_with_different_recipes_are_refused(pico: Pico, tmp_path: Path) -> None:
    """The process and the part of the recipe that differ are named; nothing is written."""
    first = write(pico, tmp_path, "run", METHODS["gradients"])
    other = pico.write_recipe(tmp_path / "other.yml", tmp_path / "run", **{**OPTIONS, "prune": {"method": "wanda"}})
    script = tmp_path / "two.py"
    script.write_text(_OTHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, str(script), str(first), str(other)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "process 1 has another recipe (prune) than process 0" in done.stderr
    assert not (tmp_path / "run").exists()


_DIES = """
import os, signal, sys
from secateur.pipeline import sharding
from secateur.cli.main import main
run_share = sharding.Passes._run_share
def die(self, order, blocks):
    if self.ranks.rank == 1 and order.bucket == "general":
        os.kill(os.getpid(), signal.SIGKILL)
    return run_share(self, order, blocks)
sharding.Passes._run_share = die
sys.exit(main(["calibrate", sys.argv[1], "-q"]))
"""


def test_a_killed_process_ends_the_run_and_what_was_finished_is_kept(pico: Pico, tmp_path: Path) -> None:
    """The survivor says what happened; the bucket that was finished is reused when all start again."""
    recipe, script = write(pico, tmp_path, "run", METHODS["gradients"]), tmp_path / "dies.py"
    script.write_text(_DIES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, str(script), str(recipe)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "start the same command again" in done.stderr
    kept = tmp_path / "run" / "statistics" / "medical.safetensors"
    before = kept.stat().st_mtime_ns
    assert not (tmp_path / "run" / "statistics" / "general.safetensors").exists()
    again = run(recipe, "calibrate", 2)
    assert again.returncode == 0, again.stderr
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "run" / "statistics" / "general.safetensors").exists()


_FAILS = """
import os, sys
from secateur.errors import CheckpointError
from secateur.pipeline import sharding
from secateur.cli.main import main
run_share = sharding.Passes._run_share
def fail(self, order, blocks):
    if self.ranks.rank == 1:
        raise CheckpointError("activations at the input of layer 1 are not finite.")
    return run_share(self, order, blocks)
sharding.Passes._run_share = fail
sys.exit(main(["calibrate", sys.argv[1], "-q"]))
"""


def test_a_process_that_fails_tells_the_others_why(pico: Pico, tmp_path: Path) -> None:
    """Process 0 does not wait for a share that will not come; it says which process stopped, and its message."""
    recipe, script = write(pico, tmp_path, "run", METHODS["gradients"]), tmp_path / "fails.py"
    script.write_text(_FAILS)
    started = time.monotonic()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, str(script), str(recipe)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and time.monotonic() - started < 200
    assert "process 1 of 2 stopped: activations at the input of layer 1 are not finite." in done.stderr


_SHARDED = """
import sys
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from secateur.cli.main import main
from secateur.recover import trainer
end_step = trainer.RecoveryTrainer.end_step
def check(self, control):
    assert all(isinstance(parameter, DTensor) for parameter in self.model_wrapped.parameters()), "not spread"
    return end_step(self, control)
trainer.RecoveryTrainer.end_step = check
code = main(["recover", sys.argv[1], "-q"])
assert AcceleratorState().distributed_type.value == "FSDP"
sys.exit(code)
"""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What ``accelerate launch`` puts into the environment for FSDP2."""


def test_weights_spread_over_processes_train_to_the_same(pico: Pico, tmp_path: Path) -> None:
    """FSDP2 on two processes, of a model whose layers have other numbers of channels and heads, is one process's."""
    prune = {"method": "activation_norm", "units": ["ffn_channel", "gqa_group"], "budget": {"parameters": 0.3}}
    prune |= {"allocation": "global", "shape": "uneven"}
    recover = {"method": "finetune", "max_tokens": 4096, "evaluations": 2, "evaluation_tokens": 512, "baselines": []}
    recover |= {"learning_rate": 1e-3, "precision": "float32"}
    alone = write(pico, tmp_path, "alone", prune, recover={**recover, "batch_size": 4})
    spread = write(pico, tmp_path, "spread", prune, recover={**recover, "batch_size": 2})
    assert run(alone, "recover", 1).returncode == 0
    script = tmp_path / "sharded.py"
    script.write_text(_SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, str(script), str(spread)], env=environment(**FSDP2), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / name / "recovered" / "model.safetensors") for name in ("alone", "spread"))
    widths = [first[f"model.layers.{layer}.mlp.up_proj.weight"].shape[0] for layer in (0, 1)]
    heads = [first[f"model.layers.{layer}.self_attn.k_proj.weight"].shape[0] for layer in (0, 1)]
    assert widths[0] != widths[1] and heads[0] != heads[1]
    untrained = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    assert max(float((first[name] - untrained[name]).abs().max()) for name in first) > 1e-3
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0.0, atol=1e-4, msg=name)
