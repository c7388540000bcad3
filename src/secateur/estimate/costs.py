"""The formulas: what each kind of work costs in operations and bytes. Pure; every term is explained where it is made.

A multiplication and an addition count as two operations (FLOP). Weights that a token is multiplied with cost 2 FLOP
each in a forward pass; a backward pass costs that again for the gradient of the inputs, and once more for that of the
weights. Blocks are computed whole, so tokens are rounded up to whole blocks first (``in_blocks``).

Memory is in bytes at the peak of a stage. Tests compare terms with what PyTorch holds.

Letters: T tokens at once (``batch_size`` x ``block_size``), B block size, h hidden width, f channels of the FFN that a
token goes through, a channels of all query heads, k of all key/value heads, d input channels of a projection, o its
outputs, V token ids, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.estimate.size import LayerSize, ModelSize, Site

FLOAT = 4
"""Bytes of a float32."""
DOUBLE = 8
"""Bytes of a float64."""
RIDGES = 5
"""Ridges that a reconstruction tries."""
ALLOCATOR_SHARE = 0.2
"""What the allocator holds besides what is asked of it, as a share of everything but the dense weights, which lie in
one piece each: fitted to four runs, whose peaks then came out at 0.90 to 1.13 of what was measured (BENCHMARKS.md)."""
CHECKPOINT_BYTES = 12
"""Per trained parameter on disk: the weight and two moments of Adam, in float32."""
CHECKPOINTS = 3
"""Checkpoints of a training that are there for a moment: the best, the last, and the one being written."""


def in_blocks(tokens: int, block: int) -> int:
    """Return tokens rounded up to whole blocks, which is what is computed."""
    return math.ceil(tokens / block) * block


# -- operations ----------------------------------------------------------------------------------------------------


def layers_flops(size: ModelSize, tokens: int, block: int) -> float:
    """Return the FLOP of all decoder layers on tokens: 2 per active weight, and attention's 4 B a.

    Attention multiplies queries with keys and the result with values, 2 B a each, over the whole block.
    """
    return tokens * sum(2.0 * layer.active + 4.0 * block * size.heads for layer in size.layers)


def head_flops(size: ModelSize, tokens: int) -> float:
    """Return the FLOP of the output head: 2 h V per token."""
    return tokens * 2.0 * size.hidden * size.vocab


def gram_flops(sites: Sequence[Site], tokens: int) -> float:
    """Return the FLOP of the sums of x xT: 2 d^2 per token and site, of which 9/16 are computed."""
    return tokens * sum(2.0 * site.width**2 for site in sites) * 9 / 16


def gradient_flops(size: ModelSize, tokens: int, block: int) -> float:
    """Return the FLOP of the decoder layers forwards, backwards, and of weight gradients: three forward passes."""
    return 3.0 * layers_flops(size, tokens, block)


def fit_flops(sites: Sequence[Site], kept_share: float) -> float:
    """Return the FLOP of the least-squares fits of all sites.

    With n of d channels kept: for each of 5 ridges, and once more at the end, a Cholesky factor, n^3 / 3, and its
    solution for o outputs, 2 o n^2; for each ridge the error on held-out text, 2 o n^2; and four products of a weight
    with a Gram matrix, 2 o n d.
    """
    total = 0.0
    for site in sites:
        kept = site.width * kept_share
        solved = (RIDGES + 1) * (kept**3 / 3 + 2 * site.out * kept**2)
        total += solved + RIDGES * 2 * site.out * kept**2 + 4 * 2 * site.out * kept * site.width
    return total


def inverse_flops(sites: Sequence[Site]) -> float:
    """Return the FLOP of a method that inverts every Gram matrix: about 8 d^3 per site, its eliminations included."""
    return sum(8.0 * site.width**3 for site in sites)


# -- memory --------------------------------------------------------------------------------------------------------


def weights_bytes(parameters: int, itemsize: int) -> int:
    """Return the bytes of weights in memory or on disk: P x bytes per parameter."""
    return parameters * itemsize


def activation_bytes(size: ModelSize, tokens: int, itemsize: int) -> int:
    """Return what one layer holds at its widest without gradients: T (3 h + 3 f), or T (3 h + a + 2 k + a) if larger.

    The FFN holds its gate, its other half and their product beside the residual stream and its normed copy; attention
    its queries, keys, values and result.
    """
    layer = size.widest
    ffn = 3 * layer.ffn
    attention = 2 * size.heads + 2 * size.kv
    return tokens * (3 * size.hidden + max(ffn, attention)) * itemsize


def saved_elements(size: ModelSize, layer: LayerSize) -> int:
    """Return the numbers per token that one layer keeps for its backward pass: 10 h + 5 f + 4 a + 4 k.

    Two norms keep their input, its normed form and the scaled one (and a copy in float32 where the model is narrower);
    the projections keep what they read; rotary embeddings and attention keep queries, keys, values and the result; the
    FFN keeps gate, activation, the other half, their product, and one more for the activation's slope.
    """
    return 10 * size.hidden + 5 * layer.ffn + 4 * size.heads + 4 * size.kv


def saved_bytes(size: ModelSize, tokens: int, itemsize: int, *, checkpointing: bool = False) -> int:
    """Return what all layers keep for a backward pass over T tokens.

    With gradient checkpointing every layer keeps its input, T h, and one layer at a time keeps the rest.
    """
    per_layer = [saved_elements(size, layer) for layer in size.layers]
    if checkpointing:
        return tokens * itemsize * (size.hidden * size.num_layers + max(per_layer))
    return tokens * itemsize * sum(per_layer)


def logits_bytes(size: ModelSize, tokens: int, itemsize: int, copies: int = 1) -> int:
    """Return the bytes of logits, T V each; often the largest tensor of all."""
    return tokens * size.vocab * itemsize * copies


def gram_sum_bytes(sites: Sequence[Site]) -> int:
    """Return the bytes of Gram matrices while they are summed: of d^2 float32 per site the upper 9/16."""
    return sum(site.width**2 for site in sites) * FLOAT * 9 // 16


def gram_bytes(sites: Sequence[Site]) -> int:
    """Return the bytes of finished Gram matrices, in memory and on disk: d^2 float32 per site."""
    return sum(site.width**2 for site in sites) * FLOAT


def fit_bytes(sites: Sequence[Site], kept_share: float) -> int:
    """Return what the fit of the widest site holds: its matrices of both texts, and the equations in float64.

    Three matrices d^2 in float32 (calibration, validation, both), six n^2 in float64 (two blocks and their symmetric
    forms, the damped one and its factor), and six o n in float64.
    """
    most = 0
    for site in sites:
        kept = site.width * kept_share
        most = max(most, round(3 * site.width**2 * FLOAT + 6 * kept * kept * DOUBLE + 6 * site.out * kept * DOUBLE))
    return most


def hidden_bytes(size: ModelSize, tokens: int, itemsize: int, streams: int) -> int:
    """Return the bytes of residual streams of a whole text, N h each for N tokens."""
    return tokens * size.hidden * itemsize * streams


def lora_parameters(size: ModelSize, rank: int) -> int:
    """Return the parameters of adapters on all linear layers: rank x (inputs + outputs) each."""
    matrices = (
        shape for name, shape in size.shapes.items() if size.geometry.layer_of(name) is not None and len(shape) == 2
    )
    return sum(rank * (shape[0] + shape[1]) for shape in matrices)


def optimizer_bytes(trained: int) -> int:
    """Return what training adds to the weights: a gradient and two moments of Adam, 12 bytes per trained parameter."""
    return trained * 3 * FLOAT
