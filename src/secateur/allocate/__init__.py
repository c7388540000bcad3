"""Allocation: scores and a budget in, a plan out; knows costs but no weights."""

from secateur.allocate.constants import with_constants
from secateur.allocate.plan import choose_blocks, make_plan, same_size_plan
from secateur.allocate.request import Request

__all__ = ["Request", "choose_blocks", "make_plan", "same_size_plan", "with_constants"]
