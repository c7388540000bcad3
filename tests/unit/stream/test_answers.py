"""What a model writes after prompts, where each of them is told apart though they run at once."""

from __future__ import annotations

import pytest
import torch

from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.stream.answers import write_answers
from tests.conftest import pico_model

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjusting_knows_prompt_and_step(dtype: torch.dtype) -> None:
    """Whichever token it makes the largest is written, each prompt its own at each step, padded or one by one."""
    model = pico_model(families()["llama"], dtype)

    def adjust(place: int, step: int, logits: torch.Tensor) -> torch.Tensor:
        changed = torch.full_like(logits, -torch.inf)
        changed[20 + 10 * place + step] = 0.0
        return changed

    written = write_answers(model, PROMPTS, [], max_new_tokens=3, adjust=adjust)
    assert written == [[20, 21, 22], [30, 31, 32], [40, 41, 42]]
    assert write_answers(model, PROMPTS, [31], max_new_tokens=3, adjust=adjust)[1] == [30, 31]


def test_company_changes_no_answer(family: Family) -> None:
    """In every family a prompt is answered beside longer ones as it is alone; the model's own settings stay."""
    model = pico_model(family, torch.float32)
    before = model.generation_config
    together = write_answers(model, PROMPTS, [], max_new_tokens=4)
    assert together == [write_answers(model, [prompt], [], max_new_tokens=4)[0] for prompt in PROMPTS]
    assert model.generation_config is before
