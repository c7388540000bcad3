"""Learned masks: how likely a unit's gate stays open when gates are trained on the text under a budget.

Source: hard-concrete gates by Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0
Regularization", arXiv 1712.01312; trained under a size constraint by Wang et al. 2020
(arXiv 1910.04732), Xia et al. 2022 (CoFi, arXiv 2204.00408) and, for large language models, Xia et al. 2024
(Sheared-LLaMA, arXiv 2310.06694); on a domain's text by ATP (2024, arXiv 2412.14426).

All gates are trained together, so unlike scores that judge units one by one the result knows which units stand in for
each other. The formulas are in ``calibrate/masks.py``.

With the option ``lora`` low-rank adapters of the weights are trained from the same gradients, so that the weights learn
to do without what goes, as in ATP; they are merged into the weights before these are cut.

Where we differ. Without ``lora`` weights stay frozen: then this only chooses, and what recovers the model is the
recovery. Gates give a ranking, and the plan cuts by it as by any other score, so the size is met exactly, with or
without the same share in every layer; ``budget: {threshold: 0.5}`` removes just the units whose gates the training
closed. Where several buckets decide, masks are trained on each alone and their probabilities averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from jaxtyping import Float64
from pydantic import Field, GetPydanticSchema
from torch import Tensor

from secateur.recipe import MaskLoraSpec
from secateur.records.masks import MaskObjective
from secateur.score.method import Evidence, Outcome, register

LoraOptions = Annotated[Mapping[str, Any], GetPydanticSchema(lambda _, handler: handler(MaskLoraSpec))]
"""The keys of ``MaskLoraSpec``."""


def _notes(outcome: Outcome) -> list[str]:
    if not outcome.options.get("lora"):
        return []
    return [
        "The weights were trained beside the masks (lora) and merged before the cut: with the dense model's own "
        "weights this plan makes another model."
    ]


@register(
    "learned_mask",
    measures="how likely the unit's gate is open after gates on all units were trained together under a budget",
    formula="score_j = P(z_j > 0) = sigmoid(log_alpha_j - beta log(-gamma / zeta)), z_j hard-concrete gates; log_alpha "
    "minimises objective + l1 (t - r) + l2 (t - r)^2, r the share of the units' parameters that is expected to go and "
    "t its target, l1 and l2 maximise it",
    needs="masks",
    cost="option steps times a forward and backward pass over one calibration block, with objective: kl another "
    "forward pass; blocks come from the first calibrate.gradient_tokens tokens; with lora the gradients and optimizer "
    "of adapters on top",
    caveat="trained for one size (option target); other budgets reuse its ranking. Gates share the cut out over "
    "layers, so shape: uniform undoes part of it. Few steps or little text fit noise",
    source="Louizos et al. 2018, arXiv 1712.01312; Xia et al. 2022, CoFi, arXiv 2204.00408; Xia et al. 2024, "
    "Sheared-LLaMA, arXiv 2310.06694; with lora as in ATP, 2024, arXiv 2412.14426",
    mask=True,
    notes=_notes,
)
def learned_mask(
    evidence: Evidence,
    /,
    *,
    target: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25,
    steps: Annotated[int, Field(gt=0)] = 200,
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.3,
    objective: MaskObjective = "loss",
    lora: bool | LoraOptions = False,
) -> Float64[Tensor, " units"]:
    """Return the probability that each unit's gate is open, 0..1; the options say how the gates were trained.

    Args:
        evidence: of the unit kind and layer.
        target: share of the units' parameters that the masks are trained to do without.
        steps: updates, each on one calibration block.
        learning_rate: of the gates.
        objective: keep low the loss on the text, or the divergence of the dense model's predictions from the masked
            ones.
        lora: low-rank adapters of the weights that are trained with the gates and merged before the cut; true takes
            the defaults.
    """
    del target, steps, learning_rate, objective, lora
    return evidence.load_masks()
