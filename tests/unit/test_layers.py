"""What answers at once: modules that import without torch, and how long the command line takes to say what it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.command import environment, fresh_python

LIGHT = [
    "secateur",
    "secateur.cli.main",
    "secateur.errors",
    "secateur.families.geometry",
    "secateur.families.loader",
    "secateur.files",
    "secateur.progress",
    "secateur.recipe",
    "secateur.records.evaluation",
    "secateur.records.plan",
    "secateur.records.survey",
    "secateur.registry",
    "secateur.report.inspection",
    "secateur.report.markdown",
    "secateur.report.tables",
    "secateur.report.vocabulary",
    "secateur.vocabulary",
]
HEAVY = ["torch", "transformers", "datasets", "numpy", "pyarrow", "huggingface_hub", "safetensors"]


def test_light_modules_import_without_the_heavy_libraries() -> None:
    """Reading recipes, plans and reports, and finding a command, need neither torch nor transformers."""
    code = f"""
import importlib, json, sys
loaded = {{}}
for name in {LIGHT}:
    importlib.import_module(name)
    loaded[name] = [heavy for heavy in {HEAVY} if heavy in sys.modules]
print(json.dumps(loaded))
"""
    answer = fresh_python("-c", code)
    assert answer.code == 0, answer.err
    assert answer.json() == {name: [] for name in LIGHT}


def test_help_takes_less_than_half_a_second() -> None:
    """``secateur --help`` costs under 0.5 s of processor time and names every command."""
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", "--help"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        shown = stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    for command in ("run", "calibrate", "plan", "shrink", "evaluate", "inspect", "vocabulary", "methods", "demo"):
        assert f"\n  {command} " in shown
    assert usage.ru_utime + usage.ru_stime < 0.5


def test_methods_are_listed_for_machines() -> None:
    """``python -m secateur methods --json`` prints one JSON object with what each method says of itself."""
    answer = fresh_python("-m", "secateur", "methods", "--json")
    assert answer.code == 0, answer.err
    methods = json.loads(answer.out)
    assert {"contextual", "magnitude", "random", "reversed"} <= set(methods)
    for method in methods.values():
        assert all(method[key] for key in ("measures", "formula", "needs", "cost", "caveat", "source"))
    assert {name for name, method in methods.items() if method["control"]} == {"random", "reversed"}
