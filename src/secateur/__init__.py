"""secateur: cut an open language model down to the smallest expert that is still as good on your domain's text.

The public API. Importing it loads neither torch nor transformers; the functions do. After the import, transformers'
Auto classes also load models with layers of different widths (``model_type: pruned_...``).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from secateur import autoload
from secateur.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    ExportError,
    FamilyError,
    PlanError,
    ProcessError,
    RecoveryError,
    SecateurError,
    TokenizerError,
    UnavailableError,
    VerificationError,
)

if TYPE_CHECKING:
    from secateur.api import (
        calibrate,
        compare,
        count_tokens,
        evaluate,
        experts,
        export,
        matrix,
        measure_speed,
        plan,
        recover,
        run,
        shrink,
        shrink_tokenizer,
        sweep,
    )
    from secateur.estimate import estimate
    from secateur.published import cus_prun_published
    from secateur.recipe import Recipe, load_recipe

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "ExportError",
    "FamilyError",
    "PlanError",
    "ProcessError",
    "Recipe",
    "RecoveryError",
    "SecateurError",
    "TokenizerError",
    "UnavailableError",
    "VerificationError",
    "__version__",
    "calibrate",
    "compare",
    "count_tokens",
    "cus_prun_published",
    "estimate",
    "evaluate",
    "experts",
    "export",
    "load_recipe",
    "matrix",
    "measure_speed",
    "plan",
    "recover",
    "run",
    "shrink",
    "shrink_tokenizer",
    "sweep",
]

_LAZY = {
    "Recipe": "secateur.recipe",
    "load_recipe": "secateur.recipe",
    "calibrate": "secateur.api",
    "compare": "secateur.api",
    "count_tokens": "secateur.api",
    "cus_prun_published": "secateur.published",
    "estimate": "secateur.estimate",
    "evaluate": "secateur.api",
    "experts": "secateur.api",
    "export": "secateur.api",
    "matrix": "secateur.api",
    "measure_speed": "secateur.api",
    "plan": "secateur.api",
    "recover": "secateur.api",
    "run": "secateur.api",
    "shrink": "secateur.api",
    "shrink_tokenizer": "secateur.api",
    "sweep": "secateur.api",
}


class _Package(ModuleType):
    """Keeps public functions (calibrate, estimate, evaluate, export, shrink) in view, where rooms have the same names.

    Importing ``secateur.shrink`` (the room) would otherwise put it in the place of ``secateur.shrink`` (the function).
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
autoload.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
