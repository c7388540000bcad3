"""The command line as a person meets it, called in this process; and fresh interpreters, where imports matter."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from secateur.cli.main import main

SOURCE = Path(__file__).parents[1] / "src"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answered.

    Attributes:
        code: exit code.
        out: stdout.
        err: stderr.
    """

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Return stdout as one JSON object."""
        data: dict[str, Any] = json.loads(self.out)
        return data


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """Return the answer to ``secateur`` with the given arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return Answer(stopped.value.code, output.out, output.err)


def replace_in(patch: pytest.MonkeyPatch, place: str, value: Any) -> None:
    """Put a value in the place of ``module.name``, also where a public function hides a module's name."""
    module, _, name = place.rpartition(".")
    patch.setattr(importlib.import_module(module), name, value)


def environment(**changes: str) -> dict[str, str]:
    """Return an environment for a fresh interpreter: this checkout, one thread, no network."""
    fixed = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **changes}


def fresh_python(*arguments: object, **changes: str) -> Answer:
    """Return the answer of a fresh interpreter to the given arguments, for example ``-c`` and code."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment(**changes), timeout=120
    )
    return Answer(done.returncode, done.stdout, done.stderr)
