"""Lets ``import secateur`` be enough for transformers to load our uneven models, at no cost to those who load none.

transformers looks a configuration's ``model_type`` up in one registry. Ours are put into it by the first look-up of a
type that starts with ``pruned_``, because making them imports much of transformers. If the registry's module is not
imported yet, an import hook waits for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_AWAITED = "transformers.models.auto.configuration_auto"
_PREFIX = "pruned_"


def install() -> None:
    """Offer the uneven model types to transformers, now or as soon as its registry is imported."""
    if _AWAITED in sys.modules:
        _offer(sys.modules[_AWAITED])
    elif not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())


def _offer(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _OnDemand):
        mapping._extra_content = _OnDemand(mapping._extra_content)


class _OnDemand(dict[str, Any]):
    """The registry's own additions, which grow by ours when one of them is first asked for."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(_PREFIX) and not super().__contains__(key):
            from secateur.store.modeling import register_uneven_models

            register_uneven_models()
        return super().__contains__(key)


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
            spec.loader = _ThenOffer(spec.loader)
        return spec


class _ThenOffer(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _offer(module)
