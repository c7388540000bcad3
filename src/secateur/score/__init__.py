"""Scoring: statistics and weights in, one importance per unit out; one small file per method, no budgets."""

from secateur.score import (  # noqa: F401 - importing a method's file registers it
    activation_norm,
    block_influence,
    contextual,
    contrast,
    cus_prun,
    d_pruner,
    easy_ep,
    expert_norm,
    fisher,
    fluctuation,
    frequency,
    gaprune,
    gate_mass,
    kfac,
    learned_mask,
    leverage,
    magnitude,
    minitron,
    obs,
    output_divergence,
    perplexity_drop,
    random_control,
    reap,
    reversed_control,
    stun,
    taylor,
    tyr,
    uncurl,
    wanda,
)
from secateur.score.combine import require_union, union_note
from secateur.score.method import METHODS, Evidence, Method, Outcome
from secateur.score.run import TextRecords, notes_on, rehearse, score_units, with_merged_experts

__all__ = [
    "METHODS",
    "Evidence",
    "Method",
    "Outcome",
    "TextRecords",
    "notes_on",
    "rehearse",
    "require_union",
    "score_units",
    "union_note",
    "with_merged_experts",
]
