"""Hypothesis without deadlines and with the same examples on every machine.

Strategies here draw plain data, and tests make records of it: the annotation checker draws random numbers of its own,
which Hypothesis does not allow inside a strategy.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("ci")
