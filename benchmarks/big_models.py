"""How much memory a whole job takes with ``memory: by_layer``, on random Llamas of 0.1, 1 and 7 billion parameters.

    python benchmarks/big_models.py                          0.1B, both ways of holding the model
    python benchmarks/big_models.py --shape 1B --shape 7B    other shapes; 7B takes about 27 GB of disk
    python benchmarks/big_models.py --tokens 2048            calibration tokens

Each job calibrates, cuts a quarter of the FFN channels, writes the model and measures both models on 256 tokens, in a
process of its own whose peak of resident memory is read at the end. Checkpoints, stages of a job and rows that are
there are not made again. The weights are random, so losses say nothing and are not shown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur.evaluate.peak_memory_child import _most_held
from secateur.store.artifacts import read_json, write_json
from secateur.store.shards import write_checkpoint

STORE = Path(__file__).resolve().parent.parent / "runs" / "bench" / "big-models"
COMMON = {"vocab_size": 32_000, "tie_word_embeddings": False, "max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
SHARD_BYTES = 2_000_000_000
WHOLE = ("0.1B",)
"""Shapes that are run with the whole model in memory too."""


def main() -> None:
    """Make what is not there, run what was not run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default 0.1B")
    parser.add_argument("--tokens", type=int, default=512, help="calibration tokens, default 512")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child)
        return
    rows = []
    for shape in options.shape or ["0.1B"]:
        folder = checkpoint(shape)
        ways = ("whole", "by_layer") if shape in WHOLE else ("by_layer",)
        rows += [measured(shape, folder, memory, options.tokens) for memory in ways]
    print(table(rows))


def checkpoint(shape: str) -> Path:
    """Return the folder of a random model in bfloat16, written one tensor at a time."""
    folder = STORE / shape / "dense"
    if not folder.exists():
        config = AutoConfig.for_model("llama", **COMMON, **SHAPES[shape], bos_token_id=0, eos_token_id=0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain_config = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        write_checkpoint(folder, plain_config, drawn(model), SHARD_BYTES, dtype=torch.bfloat16)
        byte_tokenizer().save_pretrained(folder)
    return folder


def drawn(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights of a model on the meta device; norms are one."""
    draw = torch.Generator().manual_seed(0)
    for name, empty in model.state_dict().items():
        value = torch.ones(empty.shape) if "norm" in name else torch.randn(empty.shape, generator=draw) * 0.02
        yield name, value.to(torch.bfloat16)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"</s>": 0, **{s: n for n, s in enumerate(alphabet, start=1)}}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def measured(shape: str, folder: Path, memory: str, tokens: int) -> dict[str, Any]:
    """Return the row of a job, run now in a process of its own if it is not there."""
    place = STORE / shape / f"{memory}-{tokens}"
    file = place / "row.json"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        text = STORE / "text.txt"
        text.write_text("\n\n".join(paragraphs()), encoding="utf-8")
        recipe = {
            "model": str(folder),
            "domain": {"text": str(text)},
            "calibrate": {"max_tokens": tokens, "block_size": 128, "batch_size": 1},
            "prune": {"method": "activation_norm", "budget": {"channels": 0.25}},
            "evaluate": {"max_tokens": 256, "batch_size": 1, "controls": []},
            "output": str(place / "run"),
            "device": "cpu",
            "dtype": "bfloat16",
            "memory": memory,
        }
        write_json(place / "recipe.json", recipe)
        command = [sys.executable, __file__, "--child", str(place / "recipe.json")]
        found = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
        weights = sum(part.stat().st_size for part in folder.glob("*.safetensors"))
        write_json(file, {"shape": shape, "memory": memory, "tokens": tokens, "weights": weights, **found})
    return read_json(file)


def paragraphs() -> Iterator[str]:
    """Yield different paragraphs, some tens of thousands of bytes together."""
    for number in range(400):
        yield f"Paragraph {number}: " + " ".join(f"{number * k % 97} times {k}" for k in range(1, 12))


def run_child(recipe: Path) -> None:
    """Run a job and print its seconds and peaks; torch and transformers are imported before the first."""
    asked = read_json(recipe)
    torch.set_num_threads(1)
    before, started = _most_held(), time.perf_counter()
    secateur.run(asked, until="evaluate")
    print(json.dumps({"seconds": time.perf_counter() - started, "start": before, "peak": _most_held()}))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, decimal units."""
    lines = [
        "| model | weights on disk | memory | tokens | peak | above the start | time |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [f"{value / 1e9:.2f} GB" for value in (row["weights"], row["peak"], row["peak"] - row["start"])]
        lines.append(
            f"| {row['shape']} | {sizes[0]} | `{row['memory']}` | {row['tokens']} | {sizes[1]} | {sizes[2]} | "
            f"{row['seconds']:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
