"""Lets ``import secateur`` be enough for transformers to load our uneven models, without importing transformers.

transformers finds model types in registries of its Auto classes. If those are loaded already, ours are registered at
once; otherwise an import hook waits for them and registers right after.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_AWAITED = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Register the uneven model types now, or as soon as transformers' Auto classes are imported."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())


def _register() -> None:
    from secateur.store.modeling import register_uneven_models

    register_uneven_models()


class _Waiter(importlib.abc.MetaPathFinder):
    """Steps aside for every import but one, and wraps that one's loader."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the awaited module's own spec with our loader around it; None for every other module."""
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
