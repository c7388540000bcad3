"""A whole pico project on disk: model folder with a trained tokenizer, domain corpus, general text, and its recipe.

Everything is generated and seeded; nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

NUM_LAYERS = 2
INTERMEDIATE_SIZE = 96
NUM_GROUPS = 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": NUM_GROUPS,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""A llama with four GQA groups of two query heads; keeping three groups (6 heads) is what its configuration refuses."""

_SUBJECTS = ["The patient", "A child", "This trial", "The surgeon", "Each cohort", "An elderly woman", "The nurse"]
_VERBS = ["received", "refused", "reported", "measured", "described", "tolerated", "stopped"]
_OBJECTS = ["aspirin", "a transfusion", "mild nausea", "insulin", "the second dose", "chest pain", "no benefit"]
_TIMES = ["at noon", "after surgery", "for ten days", "in the first week", "before discharge", "twice a day"]
_TOWNS = ["Paris", "Łódź", "Kyoto", "Nairobi", "Lima", "Oslo", "Reykjavík"]
_CLAIMS = ["lies on a river", "has an old harbour", "holds a market on Sundays", "built a new bridge", "grew fast"]


@dataclass(frozen=True, slots=True)
class Pico:
    """Where the pieces of a pico project are.

    Attributes:
        model: the model folder.
        domain: questions and answers, one JSON object per line.
        general: paragraphs of plain text.
    """

    model: Path
    domain: Path
    general: Path

    def recipe(self, output: Path, **changes: Any) -> dict[str, Any]:
        """Return the plain data of a small recipe on this project; ``changes`` replace top-level keys."""
        return {
            "model": str(self.model),
            "domain": {
                "medical": {"path": str(self.domain), "text": "Question: {question}\nAnswer: {answer}"},
            },
            "general": str(self.general),
            "calibrate": {"max_tokens": 2048, "block_size": 64, "batch_size": 8},
            "prune": {"method": "contextual", "budget": {"channels": 0.25}},
            "evaluate": {"max_tokens": 768, "batch_size": 8, "controls": ["random"]},
            "output": str(output),
            "device": "cpu",
            **changes,
        }

    def write_recipe(self, file: Path, output: Path, **changes: Any) -> Path:
        """Write the recipe as YAML and return its path."""
        return write_yaml(file, self.recipe(output, **changes))


def write_yaml(file: Path, data: Mapping[str, Any]) -> Path:
    """Write plain data as YAML and return the path."""
    file.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
    return file


def build_pico(folder: Path) -> Pico:
    """Write a pico project into ``folder``."""
    pico = Pico(folder / "pico-llama", folder / "medical.jsonl", folder / "general.txt")
    write_records(pico.domain, medical_records(400))
    pico.general.write_text("\n\n".join(general_paragraphs(300)) + "\n", encoding="utf-8")
    save_model_folder(pico.model)
    return pico


def medical_records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return ``count`` different question and answer records."""
    draw = random.Random(seed)
    return [
        {"question": f"Case {seed}-{number}: {_sentence(draw)[:-1]}?", "answer": _paragraph(draw, draw.randint(1, 3))}
        for number in range(count)
    ]


def general_paragraphs(count: int, seed: int = 0) -> list[str]:
    """Return ``count`` different paragraphs on other matters, not all ASCII."""
    draw = random.Random(seed)
    return [
        f"{number}. " + " ".join(f"{draw.choice(_TOWNS)} {draw.choice(_CLAIMS)}." for _ in range(draw.randint(2, 5)))
        for number in range(count)
    ]


def write_records(file: Path, records: list[dict[str, str]]) -> Path:
    """Write records as JSON lines and return the path."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def save_model_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, model_type: str = "llama", seed: int = 0, **changes: Any
) -> Path:
    """Save a random model with its tokenizer, model card and licence as a folder, and return its path."""
    tokenizer = pico_tokenizer()
    options = {"vocab_size": len(tokenizer), **changes}
    random_model(dtype=dtype, model_type=model_type, seed=seed, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Pico\n", encoding="utf-8")
    (folder / "LICENSE").write_text("Do what you like.\n", encoding="utf-8")
    return folder


def random_model(
    vocab_size: int = 512,
    *,
    dtype: torch.dtype = torch.float32,
    model_type: str = "llama",
    seed: int = 0,
    **changes: Any,
) -> Any:
    """Return a random model in evaluation mode; every parameter is drawn, norms around one."""
    sizes = SIZES if model_type == "llama" else {}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{"vocab_size": vocab_size, **ids, **sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model.to(dtype).eval()


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the generated text; it puts no special token by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def _training_text() -> Iterator[str]:
    for record in medical_records(150, seed=1):
        yield f"Question: {record['question']}\nAnswer: {record['answer']}"
    yield from general_paragraphs(100, seed=1)


def _sentence(draw: random.Random) -> str:
    return f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)} {draw.choice(_TIMES)}."


def _paragraph(draw: random.Random, sentences: int) -> str:
    return " ".join(_sentence(draw) for _ in range(sentences))
