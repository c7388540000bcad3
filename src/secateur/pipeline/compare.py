"""Finished runs set side by side: their folders are read, and no model is; the comparison itself is ``records``'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from secateur.errors import ConfigError, SecateurError
from secateur.pipeline.page import read_run
from secateur.pipeline.rounds import read_result_plan
from secateur.recipe import load_recipe
from secateur.records.comparison import ComparedRun, Comparison, compare_runs
from secateur.records.plan import Plan
from secateur.report.page.records import RECOVERED


def compare(
    folders: Sequence[Path], *, baseline: Path | str | None = None, buckets: Sequence[str] | None = None
) -> Comparison:
    """Return finished runs side by side.

    Args:
        folders: two or more run folders.
        baseline: which of them, by its folder or its name, the others are compared with; None takes the first.
        buckets: names of the text to compare on; None takes all that every run was measured on.

    Raises:
        ConfigError: a folder is no run or is given twice, or the runs were measured on different text.
        CheckpointError: a result is missing or broken (the message says which file, and how to make it again).
    """
    if len(folders) < 2:
        raise ConfigError(f"a comparison needs at least two runs; got {len(folders)}. Give another run folder.")
    names = run_names(folders)
    read = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    comparison = compare_runs([run for run, _ in read], baseline=_named(baseline, folders, names), buckets=buckets)
    gone = [
        f"Which units {run.name} has lost in its last rounds is not known: its model is gone."
        for run, has_plan in read
        if not has_plan
    ]
    return replace(comparison, notes=(*comparison.notes, *gone))


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder: as many of its last parts as tell it from the others.

    Raises:
        ConfigError: a folder is given twice.
    """
    whole = [folder.expanduser().resolve() for folder in folders]
    for index, folder in enumerate(whole):
        if folder in whole[:index]:
            raise ConfigError(f"{folders[index]} is given twice. Compare a run with another one.")
    longest = max((len(folder.parts) for folder in whole), default=0)
    for size in range(1, longest + 1):
        names = [Path(*folder.parts[-size:]).as_posix() for folder in whole]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in whole]


def _named(baseline: Path | str | None, folders: Sequence[Path], names: Sequence[str]) -> str | None:
    """Return the name of the run that is meant by a folder or a name."""
    if baseline is None or str(baseline) in names:
        return None if baseline is None else str(baseline)
    meant = Path(baseline).expanduser().resolve()
    found = [name for folder, name in zip(folders, names, strict=True) if folder.expanduser().resolve() == meant]
    return found[0] if found else str(baseline)


def _read(folder: Path, name: str) -> tuple[ComparedRun, bool]:
    """Return a run, and whether its plan is of all that its result has lost."""
    records, recipe = read_run(folder), load_recipe(folder / "recipe.yml")
    in_rounds = records.result.name == RECOVERED and recipe.recover is not None and recipe.recover.rounds > 1
    plan = _last_plan(folder) if in_rounds else records.plan
    run = ComparedRun(
        name=name,
        folder=str(folder),
        model=records.short_model,
        model_fingerprint=records.plan.model_fingerprint,
        domains=tuple(records.domains),
        dense=records.dense,
        result=records.result,
        plan=plan or records.plan,
        recipe=recipe.model_dump(mode="json"),
        chosen=recipe.model_dump(mode="json", exclude_defaults=True),
    )
    return run, plan is not None


def _last_plan(folder: Path) -> Plan | None:
    """Return what was lost in all rounds; None where the model, and the plan with it, was deleted to save space."""
    try:
        return read_result_plan(folder / RECOVERED)
    except SecateurError:
        return None
