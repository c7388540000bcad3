"""Keys for readers older than transformers 5: what they take for the rotation is what newer ones take."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.families.loader import families
from secateur.families.older_keys import older_keys
from secateur.families.schema import Family
from tests.conftest import pico_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 5.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LINEAR = {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 5.0}


@pytest.mark.parametrize(
    ("name", "rope", "expected"),
    [
        ("llama", PLAIN, {"rope_theta": 5.0}),
        ("llama", LLAMA3, {"rope_theta": 5.0, "rope_scaling": LLAMA3}),
        ("phi", {**PLAIN, "partial_rotary_factor": 0.5}, {"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
        (
            "gpt_neox",
            {**PLAIN, "partial_rotary_factor": 0.5},
            {"rope_theta": 5.0, "rotary_emb_base": 5.0, "partial_rotary_factor": 0.5, "rotary_pct": 0.5},
        ),
        (
            "gemma3_text",
            {"full_attention": LINEAR, "sliding_attention": PLAIN},
            {"rope_theta": 7.0, "rope_local_base_freq": 5.0, "rope_scaling": LINEAR},
        ),
        (
            "phi3",
            LONGROPE,
            {
                "rope_theta": 5.0,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            },
        ),
        ("gpt2", None, {}),
    ],
)
def test_the_older_names_say_what_the_newer_ones_do(name: str, rope: Any, expected: dict[str, Any]) -> None:
    """Base, share of a head that turns, and scaling where there is one; nothing where nothing turns."""
    assert older_keys({"rope_parameters": rope} if rope else {}, families()[name]) == expected


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3, {**LINEAR, "partial_rotary_factor": 0.5}, LONGROPE])
def test_newer_readers_are_not_led_astray(family: Family, rope: dict[str, Any]) -> None:
    """Transformers prefers ``rope_scaling`` where both are written; with it the configuration reads as without."""
    from transformers import AutoConfig

    if family.name in ("gpt2", "opt") or (family.name == "phi3") != (rope is LONGROPE):
        pytest.skip("this family does not turn so")
    given = {"full_attention": rope, "sliding_attention": PLAIN} if family.name == "gemma3_text" else rope
    config = pico_config(family, rope_parameters=given, max_position_embeddings=64).to_dict()
    added = older_keys(config, family)
    plain = {**config, **added}
    again = AutoConfig.for_model(plain.pop("model_type"), **plain).to_dict()
    found, wanted = again["rope_parameters"], config["rope_parameters"]
    assert {key: found[key] for key in wanted} == wanted
    assert set(found) - set(wanted) <= {"type"}
