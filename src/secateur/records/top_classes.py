"""Next-token distributions known by their most likely tokens only: what is kept of a teacher's predictions.

Dims: ``tokens`` predictions, ``k`` token ids that are known of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TopClasses:
    """Distributions over k tokens and one more class, which is all other tokens together.

    Attributes:
        values: log-probabilities of the tokens in ``indices``, in nats.
        indices: token ids.
        log_rest: log of the probability of all other tokens together; -inf where there are none.
    """

    values: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    log_rest: Float[Tensor, " tokens"]

    def __len__(self) -> int:
        return len(self.log_rest)
