"""A training small enough to run many times: a pico model, text of uneven lengths, and a probe of the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur.families.loader import family_of
from secateur.recipe import RecoverSpec
from secateur.records.recovery import Recovery
from secateur.recover.batch import TrainingBatch
from secateur.recover.curve import Probe
from secateur.recover.examples import TrainingExamples, collate
from secateur.recover.teacher import NextToken
from secateur.recover.train import train
from tests.blocks import HandMadeBlocks
from tests.pico import random_model

LLAMA = family_of("llama")
VOCABULARY = 40
DOMAINS = ("medical",)


def lessons(num_blocks: int = 12) -> TrainingExamples:
    """Return blocks of 16 tokens with one document each that counts upwards; their lengths differ."""
    texts = [[(3 * i + j) % VOCABULARY for j in range(4 + i % 13)] for i in range(num_blocks)]
    return TrainingExamples([HandMadeBlocks(texts, [[i] for i in range(num_blocks)], 16)])


def whole_batch(examples: TrainingExamples) -> TrainingBatch:
    """Return all blocks as one batch."""
    items = collate([examples[i] for i in range(len(examples))])
    return TrainingBatch(items["input_ids"], items["position_ids"], items["learned"], items["index"])


def text_probe(examples: TrainingExamples) -> Callable[[Any], Probe]:
    """Return a probe of the loss on the training text itself."""
    batch = whole_batch(examples)

    def probe(model: Any) -> Probe:
        with torch.inference_mode():
            return Probe({"medical": float(NextToken(LLAMA)(model, batch)) / batch.num_learned}, {})

    return probe


def told_probe(*losses: float) -> Callable[[Any], Probe]:
    """Return a probe that says the given losses in turn."""
    left = iter(losses)
    return lambda model: Probe({"medical": next(left)}, {})


def pico_student(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return the untrained pico model, the same every time."""
    return random_model(VOCABULARY, dtype=dtype, **changes)


def spec(**changes: Any) -> RecoverSpec:
    """Return options for a short training in float32; ``changes`` replace some."""
    options = {
        "method": "finetune",
        "batch_size": 2,
        "epochs": 2,
        "evaluations": 4,
        "learning_rate": 2e-3,
        "precision": "float32",
    }
    return RecoverSpec.model_validate({**options, **changes})


def run_training(
    folder: Path,
    options: RecoverSpec | None = None,
    *,
    model: Any = None,
    examples: TrainingExamples | None = None,
    **changes: Any,
) -> tuple[Any, Recovery]:
    """Return what ``train`` returns for the pico training, or a variation of it."""
    examples = examples or lessons()
    given = {
        "objective": NextToken(LLAMA),
        "family": LLAMA,
        "name": "recovered",
        "folder": folder,
        "probe": text_probe(examples),
        "domains": DOMAINS,
        "key": "pico",
        **changes,
    }
    objective = given.pop("objective")
    return train(model or pico_student(), examples, objective, options or spec(), **given)
