"""Cutting token ids out of every family: what stays is exactly the dense model, restricted; nothing points outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.allocate.budget import parameters_after
from secateur.errors import PlanError, TokenizerError
from secateur.families.geometry import parameters_by_part
from secateur.families.schema import Family
from secateur.records.units import FFN_CHANNEL
from secateur.stream.forward import run_logits
from tests.blocks import lay_blocks
from tests.conftest import geometry_of, pico_model
from tests.pruning import choose_units, logits, masked, plan_keeping, prune, relative_difference

KEEP = (0, 1, 2, 5, 8, 13, 21, 22, 23, 34, 55, 60, 89, 96)
"""Old ids that stay: the three special ones, neighbours, and the last."""

tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def new_ids(rows: int = 3, length: int = 9) -> torch.Tensor:
    """Return random ids of the smaller vocabulary."""
    return torch.randint(0, len(KEEP), (rows, length), generator=torch.Generator().manual_seed(4))


def cut(model: Any, family: Family) -> Any:
    """Return the model without the token ids that are not in ``KEEP``."""
    geometry = geometry_of(model, family)
    return prune(model, plan_keeping(geometry, {}, "uniform", tokens=KEEP), geometry)


@tied_or_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits_are_those_of_the_dense_model_restricted(family: Family, tied: bool, dtype: torch.dtype) -> None:
    """For text of kept tokens every kept id has the dense model's logit, to rounding of one matrix product.

    In float64 the difference is at most 1e-12 of the largest logit; a wrong row or bias would differ by about 1.
    """
    model = pico_model(family, dtype, tie_word_embeddings=tied)
    pruned = cut(model, family)
    keep = torch.tensor(KEEP)
    expected = logits(model, keep[new_ids()])[..., keep]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_difference(logits(pruned, new_ids()), expected) <= tolerance
    for weight in (pruned.get_input_embeddings().weight, pruned.get_output_embeddings().weight):
        assert weight.shape[0] == len(KEEP)
    assert (pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight) is tied


def test_rows_are_copied_bit_for_bit(family: Family) -> None:
    """A kept id's numbers are the dense ones; nothing is averaged or drawn anew."""
    model = pico_model(family, torch.float32, tie_word_embeddings=False)
    pruned = cut(model, family)
    dense, state = model.state_dict(), pruned.state_dict()
    held = [name for name in geometry_of(model, family).vocabulary_costs({k: tuple(v.shape) for k, v in dense.items()})]
    assert len(held) >= 2
    for name, tensor in state.items():
        assert torch.equal(tensor, dense[name][list(KEEP)] if name in held else dense[name])


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_token_ids_and_units_of_layers_go_together(family: Family, shape: str) -> None:
    """One plan may cut both; the result is the masked dense model restricted to the kept ids."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, (FFN_CHANNEL,), shape)
    pruned = prune(model, plan_keeping(geometry, kept, shape, tokens=KEEP), geometry)
    keep = torch.tensor(KEEP)
    with masked(model, geometry, kept):
        expected = logits(model, keep[new_ids()])[..., keep]
    assert relative_difference(logits(pruned, new_ids()), expected) <= 1e-12


@tied_or_not
def test_the_promised_parameter_count_is_the_real_one(family: Family, tied: bool) -> None:
    """The allocator's arithmetic agrees with the tensors of the pruned model, part by part."""
    model = pico_model(family, tie_word_embeddings=tied)
    geometry = geometry_of(model, family)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    left = {name: tuple(parameter.shape) for name, parameter in cut(model, family).named_parameters()}
    promised = parameters_after(shapes, geometry, {}, tokens_removed=geometry.dimensions["vocab_size"] - len(KEEP))
    assert promised == parameters_by_part(left, geometry)
    assert sum(promised.values()) < sum(parameters_by_part(shapes, geometry).values())


def test_a_saved_model_loads_again_with_its_ids_renumbered(family: Family, tmp_path: Path) -> None:
    """Configuration and generation configuration name the new ids; a stock class loads the folder to equal logits."""
    from transformers import AutoModelForCausalLM

    model = pico_model(family, torch.float32, bos_token_id=5, eos_token_id=[8, 96], pad_token_id=2)
    model.generation_config.suppress_tokens = [3, 13, 55]
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 5, [8, 96]
    cut(model, family).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(reloaded, new_ids()), logits(cut(model, family), new_ids()))
    assert type(reloaded).__module__.startswith("transformers.")
    assert reloaded.config.vocab_size == len(KEEP)
    assert (reloaded.config.bos_token_id, reloaded.config.eos_token_id, reloaded.config.pad_token_id) == (3, [4, 13], 2)
    generation = reloaded.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (3, [4, 13])
    assert generation.suppress_tokens == [5, 10]


def test_no_generated_id_is_out_of_range(family: Family) -> None:
    """Sampling at a high temperature meets only ids of the smaller vocabulary, and the same cache as ever."""
    pruned = cut(pico_model(family), family)
    torch.manual_seed(0)
    prompt = new_ids()
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "min_new_tokens": 20, "max_new_tokens": 20}
    sampled = pruned.generate(prompt, do_sample=True, temperature=5.0, top_k=0, **options)
    assert sampled.shape == (3, 29)
    assert 0 <= int(sampled.min()) and int(sampled.max()) < len(KEEP)


def test_packed_text_reads_as_before(family: Family) -> None:
    """Blocks of several documents give the restricted logits too."""
    model = pico_model(family)
    batch = lay_blocks([[3, 4, 5, 6], [7, 1, 2]], [[0, 1]], 10)
    dense = lay_blocks([[KEEP[i] for i in (3, 4, 5, 6)], [KEEP[i] for i in (7, 1, 2)]], [[0, 1]], 10)
    with torch.inference_mode():
        expected = run_logits(model, dense, family)[0, :7][:, list(KEEP)]
        assert relative_difference(run_logits(cut(model, family), batch, family)[0, :7], expected) <= 1e-12


def test_an_id_that_the_configuration_needs_cannot_go(family: Family) -> None:
    """A plan that drops the end-of-text id is refused by the key that names it."""
    model = pico_model(family, eos_token_id=50)
    with pytest.raises(TokenizerError, match="eos_token_id"):
        cut(model, family)


def test_a_plan_for_another_vocabulary_is_refused(family: Family) -> None:
    """Both sizes are said."""
    small = cut(pico_model(family), family)
    geometry = geometry_of(pico_model(family), family)
    plan = plan_keeping(geometry, {}, "uniform", tokens=KEEP)
    with pytest.raises(PlanError, match="expects a vocabulary of 97 token ids; the model has 14"):
        prune(small, plan, geometry_of(small, family))
