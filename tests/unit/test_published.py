"""Cus-Prun as published zeroes exactly the neurons that no document of any dimension needs, and changes no shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur
from secateur.errors import ConfigError
from secateur.published import irrelevant
from secateur.records.impacts import ImpactStatistics, competition_ranks, judged
from tests.pico import general_paragraphs, medical_records, pico_tokenizer, random_model

RATIO = 0.25


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pico_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return random_model(len(tokenizer))


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    records = medical_records(60)
    return {"domain": [record["answer"] for record in records], "language": general_paragraphs(60)}


def test_the_share_of_every_matrix_is_zero_and_no_shape_changes(
    model: Any, tokenizer: Any, texts: dict[str, list[str]]
) -> None:
    """Rows of what writes channels, columns of what reads them; all else, and the model itself, stay as they were."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = secateur.cus_prun_published(model, tokenizer, texts, ratio=RATIO, max_tokens=400, block_size=64)
    after = made.model.state_dict()
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = {name for name, _ in made.neurons}
    assert len(names) == 7 * model.config.num_hidden_layers
    for (name, way), places in made.neurons.items():
        weight, dense = (state[name] if way == "rows" else state[name].T for state in (after, before))
        kept = [place for place in range(len(weight)) if place not in places]
        assert len(places) == RATIO * len(weight)
        assert not weight[list(places)].any()
        assert torch.equal(weight[kept], dense[kept])
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - names)
    assert made.num_zeroed == RATIO * made.num_weights
    assert made.num_weights == sum(before[name].numel() for name in names)


def test_an_ffn_loses_whole_channels(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    """Its three matrices have the same impacts, so here zeroing and cutting are one, and take the same channels."""
    made = secateur.cus_prun_published(model, tokenizer, texts["domain"], ratio=RATIO, max_tokens=400, block_size=64)
    for layer in range(model.config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp."
        assert made.neurons[name + "gate_proj.weight", "rows"] == made.neurons[name + "up_proj.weight", "rows"]
        assert made.neurons[name + "up_proj.weight", "rows"] == made.neurons[name + "down_proj.weight", "columns"]
    statistics = secateur.calibrate(
        model, tokenizer, texts["domain"], impacts=True, max_tokens=400, block_size=64, batch_size=2
    )
    plan = secateur.plan(model, statistics, method="cus_prun", budget={"channels": RATIO})
    for layer, kept in enumerate(plan.layers["ffn_channel"]):
        gone = set(range(kept.num_units)) - set(kept.keep)
        assert gone == set(made.neurons[f"model.layers.{layer}.mlp.up_proj.weight", "rows"])


def test_what_goes_is_the_intersection_of_what_each_document_can_do_without() -> None:
    """At the threshold that the last of them says, by sets, over documents and dimensions."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.rand(5, 40, generator=generator, dtype=torch.float64) ** 3 + torch.arange(40) for _ in range(2)]
    found = irrelevant([ImpactStatistics(5, {(0, "ffn"): judged(each)}) for each in documents], RATIO)[0, "ffn"]
    ranks = torch.cat([competition_ranks(each) for each in documents])
    threshold = int(ranks[:, list(found)].max())
    sets = [set((row <= threshold).nonzero()[:, 0].tolist()) for row in ranks]
    assert set(found) == set.intersection(*sets)
    assert len(found) == 10


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ratio": 1.0}, "above 0 and below 1"),
        ({"ratio": 0.001}, "rounds to none. Raise it to 0.0312 or more"),
        ({"texts": {}}, "texts is empty"),
    ],
)
def test_what_cannot_be_is_refused(
    model: Any, tokenizer: Any, texts: dict[str, list[str]], asked: dict[str, Any], message: str
) -> None:
    """Before any text is run."""
    with pytest.raises(ConfigError, match=message):
        secateur.cus_prun_published(model, tokenizer, **{"texts": texts, **asked})
