"""Which tensor is stored in which type: the mixtures of llama.cpp, written down here once more by hand."""

from __future__ import annotations

from typing import Any

import pytest
from gguf import GGMLQuantizationType

from secateur.errors import ExportError
from secateur.export.gguf_architectures import Layout, TensorSource
from secateur.export.gguf_types import (
    MIXTURES,
    QUANTIZATIONS,
    kind_notes,
    needed_multiple,
    quantization,
    tensor_kinds,
)

LAYERS = 16


def layout(hidden: int = 256, width: int = 512, *, tied: bool = False, queries_per_key: int = 2) -> Layout:
    """Return the tensors of a model of 16 layers."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (416, hidden), "output_norm": (hidden,)}
    shapes |= {"position_embd": (64, hidden)}
    if not tied:
        shapes["output"] = (416, hidden)
    for number in range(LAYERS):
        parts = {"attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_v": (64, hidden)}
        parts |= {"attn_output": (hidden, hidden), "ffn_up": (width, hidden), "ffn_down": (hidden, width)}
        shapes |= {f"blk.{number}.{name}": shape for name, shape in parts.items()}
    metadata: dict[str, Any] = {"deci.attention.head_count": [queries_per_key * 2] * LAYERS}
    metadata |= {"deci.attention.head_count_kv": [2] * LAYERS}
    tensors = tuple(TensorSource(f"{name}.weight", shape, ("x",)) for name, shape in shapes.items())
    return Layout("deci", metadata, tensors, ())


def kinds_of(name: str, **how: Any) -> dict[str, str]:
    """Return the type of every tensor by its name without ending."""
    kinds = tensor_kinds(layout(**how), quantization(name))
    return {tensor.removesuffix(".weight"): kind.name for tensor, kind in kinds.items()}


def per_layer(kinds: dict[str, str], part: str) -> list[str]:
    """Return the types of one tensor, layer by layer."""
    return [kinds[f"blk.{number}.{part}"] for number in range(LAYERS)]


def test_every_name_is_a_type_of_the_file_and_of_its_matrices() -> None:
    """The file's number is llama.cpp's; every mixture takes rows of 32."""
    numbers = {name: quantization(name.lower()).file_type for name in QUANTIZATIONS}
    assert (numbers["F32"], numbers["F16"], numbers["Q8_0"], numbers["BF16"]) == (0, 1, 7, 32)
    expected = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
    assert {name: numbers[name] for name in MIXTURES} == expected
    assert {needed_multiple(name) for name in MIXTURES} == {32}


MORE = {0, 1, 4, 7, 10, 13, 14, 15}
"""Of 16 layers the first two, the last two, and each third one between."""


@pytest.mark.parametrize(
    ("name", "values", "down", "output"),
    [
        ("Q6_K", ["Q6_K"] * 16, ["Q6_K"] * 16, "Q6_K"),
        ("Q5_K_S", ["Q5_K"] * 16, ["Q5_K"] * 16, "Q5_K"),
        *(
            (f"{base}_M", *[["Q6_K" if layer in MORE else base for layer in range(16)]] * 2, base)
            for base in ("Q5_K", "Q4_K")
        ),
        ("Q4_K_S", ["Q5_K"] * 4 + ["Q4_K"] * 12, ["Q5_K"] * 2 + ["Q4_K"] * 14, "Q4_K"),
        ("Q3_K_M", ["Q5_K"] * 2 + ["Q4_K"] * 14, ["Q5_K"] + ["Q4_K"] * 15, "Q4_K"),
        ("Q2_K", ["Q3_K"] * 16, ["Q3_K"] * 16, "Q3_K"),
    ],
)
def test_a_mixture_gives_more_bits_where_llama_cpp_does(
    name: str, values: list[str], down: list[str], output: str
) -> None:
    """The head has six bits, all that is not named has those of the mixture, vectors and positions are whole."""
    kinds = kinds_of(name)
    base = quantization(name).kind.name
    assert per_layer(kinds, "attn_v") == values
    assert per_layer(kinds, "ffn_down") == down
    assert set(per_layer(kinds, "attn_output")) == {output}
    assert {*per_layer(kinds, "attn_q"), *per_layer(kinds, "ffn_up"), kinds["token_embd"]} == {base}
    assert kinds["output"] == "Q6_K"
    assert {*per_layer(kinds, "attn_norm"), kinds["output_norm"], kinds["position_embd"]} == {"F32"}


def test_the_embedding_counts_as_the_head_where_it_is_one() -> None:
    """And values that many queries share get more bits in the smallest mixture."""
    assert kinds_of("Q4_K_M", tied=True)["token_embd"] == "Q6_K"
    assert kinds_of("Q4_K_M", tied=True, hidden=96)["token_embd"] == "Q8_0"
    assert set(per_layer(kinds_of("Q2_K", queries_per_key=4), "attn_v")) == {"Q4_K"}


@pytest.mark.parametrize(
    ("name", "instead"),
    [("Q6_K", "Q8_0"), ("Q5_K_S", "Q5_1"), ("Q4_K_S", "Q5_0"), ("Q3_K_M", "Q4_0"), ("Q2_K", "Q4_0")],
)
def test_rows_of_other_widths_take_a_type_with_smaller_blocks(name: str, instead: str) -> None:
    """Tensor by tensor, which is said; the type that stands in follows from the one that was wanted."""
    kinds = kinds_of(name, width=288)
    assert set(per_layer(kinds, "attn_q")) == {quantization(name).kind.name}
    assert kinds["blk.5.ffn_down"] == {"Q3_K_M": "Q5_0"}.get(name, instead)
    assert kinds_of(name, hidden=96)["blk.5.ffn_up"] == instead
    planned, chosen = layout(width=288), quantization(name)
    (note,) = kind_notes(planned, tensor_kinds(planned, chosen), chosen)
    assert note.startswith("16 of 82 matrices have rows that are no multiple of 256; they are stored as Q")
    assert kind_notes(layout(), tensor_kinds(layout(), chosen), chosen) == []
    assert kind_notes(planned, tensor_kinds(planned, quantization("Q8_0")), quantization("Q8_0")) == []


def test_rows_that_no_block_holds_are_refused() -> None:
    """llama.cpp would store them in 16 bits and lose the speed."""
    with pytest.raises(ExportError, match=r"blk.0.ffn_down.weight, .* and 13 more have rows of 300 \(nearest .*288"):
        kinds_of("Q4_K_M", width=300)
    assert tensor_kinds(layout(), quantization("F32"))["blk.0.ffn_up.weight"] == GGMLQuantizationType.F32
