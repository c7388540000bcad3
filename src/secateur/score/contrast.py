"""Contrast: how much more a method values a unit on the domain's text than on general text.

Source: ours; differences of relative use between two texts are a plain way to find what a domain makes a model do, as
in language-specific neurons (Tang et al. 2024, arXiv 2402.16438). A method's score is taken on both texts, and divided
by its mean over the layer, so that how much louder one text is does not count.

What it says is specificity, not importance: a unit that both texts need scores like one that neither needs. So as a
rule of what to remove it is a question to ask, and ``strength`` below 1 mixes importance in.
"""

from __future__ import annotations

from typing import Annotated, Literal

from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.impacts import competition_ranks
from secateur.records.units import LAYER_UNIT_KINDS
from secateur.score.method import BUCKET, METHODS, Evidence, register
from secateur.score.relative import over_mean_size
from secateur.score.routed import able_method

FLOOR = 1e-3
"""Added to both sides of a ratio, in means of the layer: below it a unit counts as unused by either text."""


@register(
    "contrast",
    measures="how much more the unit is worth to the domain than to general text, by another method",
    formula="score_j = d_j - strength * g_j (by: difference), (d_j + f) / (g_j + f)^strength with f = 0.001 (ratio), "
    "or rank(d_j) - strength * rank(g_j) (rank); d and g the scores of the method named in option `of` on the domain "
    "and on general text, each over its mean size in the layer",
    needs="as the other method",
    cost="as the other method, on both texts",
    caveat="specificity is not importance: what both texts need scores as low as what neither does",
    source="ours; compare language-specific neurons, Tang et al. 2024, arXiv 2402.16438",
    contrast=True,
    kinds=LAYER_UNIT_KINDS,
)
def contrast(
    evidence: Evidence,
    /,
    *,
    of: Annotated[str, METHODS] = "activation_norm",
    against: Annotated[str, BUCKET] = "general",
    by: Literal["difference", "ratio", "rank"] = "difference",
    strength: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0,
) -> Float64[Tensor, " units"]:
    """Return the domain specificity of each unit; above 0 (ratio: 1) where the domain values it more.

    Args:
        evidence: of the domain's text, and of general text.
        of: the method that values units, with its default options; where none is named, experts are valued by easy_ep.
        against: name of the bucket of general text.
        by: how the two scores are set against each other.
        strength: how much general text counts; 0 is the other method alone.

    Raises:
        ConfigError: there is no method ``of``, it is this one, or it cannot score such units; the domain is the text
            that it is set against; or a ratio is asked of scores below 0.
    """
    if of == "contrast":
        raise ConfigError("option of of method contrast names contrast itself. Name the method that values units.")
    if evidence.buckets == (against,):
        raise ConfigError(
            f"method contrast would set bucket {against!r} against itself. Name other text in option against."
        )
    method = able_method(of, evidence.kind, default="activation_norm")
    mine, other = (method.function(text) for text in (evidence, evidence.of_bucket(against)))
    if by == "rank":
        mine, other = (competition_ranks(values[None])[0].double() / len(values) for values in (mine, other))
        return mine - strength * other
    mine, other = over_mean_size(mine), over_mean_size(other)
    if by == "difference":
        return mine - strength * other
    if float(mine.min()) < 0.0 or float(other.min()) < 0.0:
        raise ConfigError(
            f"method contrast cannot take the ratio of scores below 0, and {of} gave some for the {evidence.kind}s of "
            f"layer {evidence.layer}. Use by: difference or by: rank."
        )
    return (mine + FLOOR) / (other + FLOOR) ** strength
