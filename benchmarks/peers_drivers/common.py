"""What every driver needs: its arguments, the model, the calibration text as blocks, and saving. Knows no peer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK_SIZE, BATCH_SIZE = 512, 4


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser for what every driver is told; a driver adds its own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--texts", required=True, help="calibration documents, a JSON object with `text` on each line")
    parser.add_argument("--tokens", required=True, type=int, help="how many tokens of them to use")
    parser.add_argument("--output", required=True, help="folder for the pruned model")
    return parser


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def save(model: Any, tokenizer: Any, folder: str) -> None:
    """Write a model and its tokenizer with transformers' own functions."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def token_blocks(tokenizer: Any, texts: str, tokens: int) -> Tensor:
    """Return the first ``tokens`` tokens of the documents, one document after the other, as blocks x ``BLOCK_SIZE``.

    There is no padding, because not every peer leaves it out of its statistics; what does not fill a block is dropped.
    """
    ids: list[int] = []
    for line in Path(texts).read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"])["input_ids"]
    whole = min(len(ids), tokens) // BLOCK_SIZE
    return torch.tensor(ids[: whole * BLOCK_SIZE]).view(whole, BLOCK_SIZE)
