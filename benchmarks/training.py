"""How fast recovery trains, beside a bare transformers Trainer on the same model, blocks and precision.

    python benchmarks/training.py --tokens 8192 --rounds 2

Both see the same packed blocks in the same order; rounds alternate, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.corpus import load_split
from secateur.demo import demo_recipe, prepare
from secateur.families.loader import family_of
from secateur.recipe import RecoverSpec
from secateur.recover.curve import Probe
from secateur.recover.examples import TrainingExamples
from secateur.recover.precision import mixed_precision
from secateur.recover.teacher import NextToken
from secateur.recover.train import train
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

BATCH_SIZE, BLOCK_SIZE = 4, 512


def _labels(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([item["input_ids"] for item in items])
    learned = torch.stack([item["learned"] for item in items])
    positions = torch.stack([item["position_ids"] for item in items])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(~learned, -100)}


def bare(model: Any, examples: TrainingExamples, folder: Path) -> float:
    """Return the seconds that a Trainer takes for one pass, saving and evaluating nothing."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=1e-4,
        bf16=mixed_precision("auto", next(model.parameters()).device) == "bf16",
        use_cpu=next(model.parameters()).device.type == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, data_collator=_labels)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def ours(model: Any, examples: TrainingExamples, folder: Path) -> float:
    """Return the seconds of training alone, as the record of a recovery tells them."""
    spec = RecoverSpec(method="finetune", batch_size=BATCH_SIZE, evaluations=1, learning_rate=1e-4)
    family = family_of(model.config.model_type)
    _, recovery = train(
        model,
        examples,
        NextToken(family),
        spec,
        family=family,
        name="speed",
        folder=folder,
        probe=lambda _: Probe({"text": 0.0}, {}),
        domains=["text"],
        key="speed",
    )
    return recovery.tokens / recovery.tokens_per_s


def measure(tokens: int, rounds: int) -> str:
    """Return the table as Markdown."""
    recipe = demo_recipe(prepare(), "runs/unused")
    checkpoint = resolve_model(recipe.model)
    blocks = load_split(
        recipe.domain["medical"],
        "calibration",
        load_tokenizer(checkpoint),
        block_size=BLOCK_SIZE,
        max_tokens=tokens,
        name="medical",
    )
    examples = TrainingExamples([blocks])
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(rounds):
        for name, run in (("bare", bare), ("ours", ours)):
            with tempfile.TemporaryDirectory() as folder:
                seconds = run(load_model(checkpoint, dtype="float32"), examples, Path(folder))
            found[name].append(examples.num_tokens / seconds)
            print(f"{name}: {found[name][-1]:,.0f} tokens/s", flush=True)
    ratios = [mine / theirs for mine, theirs in zip(found["ours"], found["bare"], strict=True)]
    cells = [statistics.median(found["ours"]), statistics.median(found["bare"])]
    return "\n".join(
        [
            "| training, tokens/s | recovery | bare Trainer | ratio (min to max) |",
            "|---|---:|---:|---:|",
            f"| {BATCH_SIZE} blocks of {BLOCK_SIZE} per step | {cells[0]:,.0f} | {cells[1]:,.0f} | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |",
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(measure(options.tokens, options.rounds))


if __name__ == "__main__":
    main()
