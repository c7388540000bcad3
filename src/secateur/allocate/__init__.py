"""Allocation: scores and a budget in, a plan out; knows costs but no weights."""

from secateur.allocate.constants import with_constants
from secateur.allocate.plan import Request, make_plan, same_size_plan

__all__ = ["Request", "make_plan", "same_size_plan", "with_constants"]
