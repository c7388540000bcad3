"""A tiny mixture of experts, trained here on three kinds of text, of which each domain keeps half the experts.

    python benchmarks/moe.py                          everything that is not there yet
    python benchmarks/moe.py --keep 0.5 --keep 0.25   shares of the experts that stay

A second table is of the same shape with a router whose weights do not add up to 1 (OLMoE's), where the scale of the
experts that stay matters; it has a model of its own.

The model reads bytes; the texts are Python source (transformers), C++ headers (torch) and English (the summaries of the
demo's encyclopedia). It is large enough to give each kind of text its own experts and to be trained in minutes, and too
small to say anything of models that people use.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur.demo import prepare
from secateur.records.evaluation import Evaluation, paired_difference
from secateur.store.artifacts import read_json, write_json

STORE = Path(__file__).resolve().parent.parent / "runs" / "bench" / "moe"
DOMAINS = ("python", "cpp", "english")
METHODS = ("easy_ep", "gate_mass", "frequency", "expert_norm", "reap", "stun", "uncurl")
CONTROLS = ["random", "reversed"]
UNEVEN = {"method": "easy_ep", "shape": "uneven", "allocation": "global", "normalize": "none"}
"""Layers compete for experts, by how much these turn the residual stream."""
RECONSTRUCTIONS = ("none", "dense", "pruned")
MODELS = {"model": "qwen3_moe", "model-olmoe": "olmoe"}
"""Folder and model type: weights of a token's experts add up to 1 in the first, and not in the second."""
BYTES_PER_TEXT, DOCUMENT_BYTES = 1_500_000, 2_000
STEPS, BATCH, LENGTH, LEARNING_RATE = 900, 24, 192, 3e-3
CALIBRATION_TOKENS, TEST_TOKENS = 24_576, 16_384
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "olmoe": {"norm_topk_prob": False},
}


def main() -> None:
    """Train the models, prune them for each kind of text, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, action="append", metavar="SHARE", help="default 0.5 and 0.25")
    options = parser.parse_args()
    STORE.mkdir(parents=True, exist_ok=True)
    if not (STORE / "texts" / "english.jsonl").is_file():
        write_texts(STORE / "texts")
    for folder, model_type in MODELS.items():
        if not (STORE / folder / "config.json").is_file():
            train(STORE / folder, STORE / "texts", model_type)
    for keep in options.keep or (0.5, 0.25):
        print("\n".join(table(keep)), flush=True)
        print("\n".join(reconstruction_table(keep)), flush=True)


def write_texts(folder: Path) -> None:
    """Write each kind of text as JSON Lines, in pieces of about ``DOCUMENT_BYTES``, drawn from all over the source."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {
        "python": _files(Path(transformers.__file__).parent, "*.py"),
        "cpp": _files(Path(torch.__file__).parent / "include" / "ATen", "*.h"),
        "english": (json.loads(line)["text"] for line in prepare().general.open(encoding="utf-8")),
    }
    for name, texts in sources.items():
        pieces = [{"text": piece} for text in texts for piece in _pieces(text)]
        random.Random(0).shuffle(pieces)
        lines, size = [], 0
        while pieces and size < BYTES_PER_TEXT:
            piece = pieces.pop()
            size += len(piece["text"])
            lines.append(json.dumps(piece, ensure_ascii=False) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _files(folder: Path, pattern: str) -> Iterator[str]:
    for file in sorted(folder.rglob(pattern)):
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield text.partition('"""' if text.startswith('"""') else "\n\n")[2]  # without the licence on top


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), DOCUMENT_BYTES):
        piece = text[start : start + DOCUMENT_BYTES].strip()
        if len(piece) > 100:
            yield piece


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: index for index, letter in enumerate(alphabet, start=1)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", model_max_length=512)


def train(folder: Path, texts: Path, model_type: str) -> None:
    """Train a model on equal parts of the three texts' calibration documents, and save it.

    Documents are those that secateur's own split gives to calibration, so test text stays unseen.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {**SIZES, **OWN_SIZES[model_type]}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), output_router_logits=True, **ids, **sizes)
    model = AutoModelForCausalLM.from_config(config).train()
    streams = [_stream(texts / f"{name}.jsonl", tokenizer) for name in DOMAINS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    draw, started = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(STEPS):
        rows = []
        for index in range(BATCH):
            stream = streams[index % len(streams)]
            at = int(torch.randint(len(stream) - LENGTH, (), generator=draw))
            rows.append(stream[at : at + LENGTH])
        batch = torch.stack(rows)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.config.output_router_logits = False
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _stream(file: Path, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    from secateur.corpus import load_split
    from secateur.recipe import CorpusSpec

    blocks = load_split(
        CorpusSpec(path=str(file)), "calibration", tokenizer, block_size=512, max_tokens=None, name=file.stem
    )
    tokens = [batch.input_ids[batch.valid] for batch in blocks.batches(8)]
    return torch.cat(tokens)


def table(keep: float) -> list[str]:
    """Return the table of one size: a row per text calibrated on and text judged on, a column per way to choose."""
    columns = [*METHODS, "random", "reversed", "easy_ep, uneven", "random, uneven"]
    lines = [
        f"{round(keep * SIZES['num_experts'])} of {SIZES['num_experts']} experts stay per layer (uneven: on average): "
        "nats per byte over dense, ± one standard error of the pair.",
        "",
        "| calibrated on | judged on | dense | " + " | ".join(columns) + " |",
        "|---|---|---:|" + "---:|" * len(columns),
    ]
    for own in DOMAINS:
        found = {name: row(own, keep, name, {"method": name}) for name in METHODS}
        uneven = row(own, keep, "uneven", UNEVEN)
        for judged in DOMAINS:
            dense = uneven.models["dense"].text[judged].nll_per_token
            cells = [_over_dense(evaluation, "pruned", judged) for evaluation in found.values()]
            cells += [_over_dense(found["easy_ep"], control, judged) for control in CONTROLS]
            cells += [_over_dense(uneven, model, judged) for model in ("pruned", "random")]
            lines.append(f"| {own} | {judged} | {dense:.3f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def reconstruction_table(keep: float) -> list[str]:
    """Return the table of ``reconstruct`` at one size: a row per model and text, calibrated and judged on it."""
    columns = [f"{method}, {reconstruct}" for method in ("easy_ep", "random") for reconstruct in RECONSTRUCTIONS]
    lines = [
        f"`reconstruct` with {round(keep * SIZES['num_experts'])} of {SIZES['num_experts']} experts per layer: nats "
        "per byte over dense on the text calibrated on, ± one standard error of the pair.",
        "",
        "| router's weights | text | dense | " + " | ".join(columns) + " |",
        "|---|---|---:|" + "---:|" * len(columns),
    ]
    for folder, model_type in MODELS.items():
        for own in DOMAINS:
            rows = {
                reconstruct: row(
                    own, keep, f"{model_type}-{reconstruct}", {"method": "easy_ep", "reconstruct": reconstruct}, folder
                )
                for reconstruct in RECONSTRUCTIONS
            }
            dense = rows["none"].models["dense"].text[own].nll_per_token
            cells = [_over_dense(found, model, own) for model in ("pruned", "random") for found in rows.values()]
            kind = "add up to 1" if OWN_SIZES[model_type]["norm_topk_prob"] else "as they come"
            lines.append(f"| {kind} | {own} | {dense:.3f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _over_dense(found: Evaluation, model: str, text: str) -> str:
    pair = paired_difference(found.models[model].text[text], found.models["dense"].text[text])
    return f"{pair.mean:.3f} ± {pair.stderr:.3f}"


def row(own: str, keep: float, name: str, prune: Mapping[str, Any], model: str = "model") -> Evaluation:
    """Return the measurements of one cut; measured once, then read back."""
    file = STORE / "rows" / f"{own}-{keep:g}-{name}.json"
    if not file.is_file():
        corpora = {text: {"path": str(STORE / "texts" / f"{text}.jsonl")} for text in DOMAINS}
        controls = CONTROLS if name == "easy_ep" else ["random"] if name == "uneven" or "reconstruct" in prune else []
        result = secateur.run(
            {
                "model": str(STORE / model),
                "domain": corpora,
                "calibrate": {"max_tokens": CALIBRATION_TOKENS, "block_size": 512, "buckets": list(DOMAINS)},
                "prune": {"units": ["expert"], "budget": {"experts": 1 - keep}, "mix": {own: 1.0}, **prune},
                "evaluate": {"max_tokens": TEST_TOKENS, "controls": controls},
                "output": str(STORE / ("run" if model == "model" else f"run-{model}")),
            }
        )
        assert result.evaluation is not None
        file.parent.mkdir(exist_ok=True)
        write_json(file, result.evaluation.to_dict())
    return Evaluation.from_dict(read_json(file))


if __name__ == "__main__":
    main()
