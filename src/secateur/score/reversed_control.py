"""The reversed control: a method's scores turned upside down; where it is not clearly worst, the scores say little.

Source: none needed; used as a sanity check in EASY-EP and REAP style studies.
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import LAYER_UNIT_KINDS
from secateur.score.method import METHODS, Evidence, register
from secateur.score.routed import able_method


@register(
    "reversed",
    measures="another method's opinion, turned upside down",
    formula="score_j = -score_j of the method named in option `of` (experts: easy_ep where none is named)",
    needs="as the other method",
    cost="as the other method",
    caveat="a control",
    source="control",
    control=True,
    kinds=LAYER_UNIT_KINDS,
)
def reversed_scores(evidence: Evidence, /, *, of: Annotated[str, METHODS] = "contextual") -> Float64[Tensor, " units"]:
    """Return minus the scores of method ``of`` with its default options.

    Raises:
        ConfigError: there is no method ``of``, or it cannot score such units.
    """
    return -able_method(of, evidence.kind, default="contextual").function(evidence)
