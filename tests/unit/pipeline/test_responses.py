"""How a corpus is asked: how long a prompt may be, how many there are, and what is said of those without an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.errors import ConfigError
from secateur.families.geometry import build_geometry
from secateur.families.loader import families
from secateur.pipeline.responses import MOST_PROMPTS, Asking
from secateur.recipe import CorpusResponsesSpec, CorpusSpec
from secateur.records.responses import Responses
from tests.conftest import pico_model
from tests.pico import medical_records, write_records


def asking(family: str = "llama", *, block_size: int = 64, max_tokens: int | None = 512, **config: Any) -> Asking:
    """Return how a pico model of a family is asked; ``config`` replaces keys of its configuration."""
    found = pico_model(families()[family]).config.to_dict()
    geometry = build_geometry(families()[family], found)
    return Asking(geometry, {**found, **config}, lambda: None, block_size, max_tokens, lambda name: f"domain.{name}.")


def test_a_prompt_fits_with_a_whole_answer_into_a_block_and_the_context() -> None:
    """The smaller of the two counts; without a known context the block does."""
    spec = CorpusResponsesSpec(prompt="{question}", max_new_tokens=24)
    assert asking(max_position_embeddings=256).longest_prompt("medical", spec) == 40
    assert asking(max_position_embeddings=32).longest_prompt("medical", spec) == 8
    assert asking(max_position_embeddings=None).longest_prompt("medical", spec) == 40
    with pytest.raises(ConfigError, match=r"domain.law.responses.max_new_tokens is 24, .* may have 24 tokens.*Lower"):
        asking(max_position_embeddings=24).longest_prompt("law", spec)


def test_learned_positions_limit_a_prompt() -> None:
    """Where positions are learned there are none beyond them."""
    learned = asking("gpt2", block_size=4096)
    positions = learned.geometry.dimensions["num_positions"]
    spec = CorpusResponsesSpec(prompt="{question}", max_new_tokens=5)
    assert learned.longest_prompt("medical", spec) == positions - 5


def test_more_text_may_need_more_prompts(tmp_path: Path) -> None:
    """All usual amounts have the same prompts, so that answers can be gone on with."""
    assert asking(max_tokens=512).most_prompts == asking(max_tokens=65_536).most_prompts == MOST_PROMPTS
    assert asking(max_tokens=2**20).most_prompts == 2**16
    assert asking(max_tokens=None).most_prompts is None
    records = write_records(tmp_path / "medical.jsonl", medical_records(30))
    spec = CorpusSpec(
        path=str(records), text="{question} {answer}", responses=CorpusResponsesSpec(prompt="Q: {question}")
    )
    prompts = asking().prompts("medical", spec)
    assert 15 < len(prompts.texts) < 30 and all(text.startswith("Q: Case") for text in prompts.texts)


def test_doubts_are_said_where_half_of_the_prompts_got_no_answer() -> None:
    """With the counts, and what to look at."""
    kept = asking()
    few = Responses((), num_empty=3, num_too_long=0, num_unended=0)
    (said,) = kept.doubts("medical", {**few.counts(), "answers": 3, "prompts": 6})
    assert said.startswith("medical: the dense model answered nothing to 3 of 6 prompts; domain.medical.responses.prom")
    (said,) = kept.doubts("medical", {**few.counts(), "answers": 5, "prompts": 16, "prompts_too_long": 8})
    assert said.startswith("medical: 8 of 16 prompts were too long to be asked; raise calibrate.block_size")
    assert not kept.doubts("medical", {**few.counts(), "answers": 4, "prompts": 10, "prompts_too_long": 3})
