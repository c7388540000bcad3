"""The options that every command on a recipe has, and the one way they run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from secateur.pipeline import RunResult, Stage

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What was said on the command line of a recipe command."""

    recipe: str
    output: str | None
    method: str | None
    budget: tuple[str, ...]
    mix: tuple[str, ...]
    settings: tuple[str, ...]
    as_json: bool
    quiet: bool

    def overrides(self) -> dict[str, Any]:
        """Return the dotted recipe keys that the command line sets."""
        from secateur.recipe import parse_override

        values = dict(parse_override(text) for text in self.settings)
        if self.output is not None:
            values["output"] = self.output
        if self.method is not None:
            values["prune.method"] = self.method
        if self.budget:
            values["prune.budget"] = dict(parse_override(text) for text in self.budget)
        if self.mix:
            values["prune.mix"] = dict(parse_override(text) for text in self.mix)
            values["prune.buckets"] = None
        return values


def recipe_options(function: F) -> F:
    """Add a recipe argument and the shared options to a command."""
    for decorate in reversed(
        [
            click.argument("recipe", type=click.Path(dir_okay=False)),
            click.option("--output", "-o", help="Run folder; wins over the recipe's."),
            click.option("--method", help="Scoring method; wins over prune.method."),
            click.option(
                "--budget", multiple=True, metavar="KEY=VALUE", help="Such as channels=0.2; wins over prune.budget."
            ),
            click.option(
                "--mix",
                multiple=True,
                metavar="BUCKET=WEIGHT",
                help="Such as medical=0.8, once per bucket; wins over prune.mix and prune.buckets.",
            ),
            click.option(
                "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key, such as prune.seed=1."
            ),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables."),
            click.option("--quiet", "-q", is_flag=True, help="No progress."),
        ]
    ):
        function = decorate(function)
    return function


def run_recipe(options: RecipeOptions, until: Stage) -> RunResult:
    """Run a recipe's stages up to and including ``until``, with progress."""
    from secateur.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides())
    return run_stages(recipe, until, as_json=options.as_json, quiet=options.quiet)


def run_stages(recipe: Any, until: Stage, *, as_json: bool, quiet: bool) -> RunResult:
    """Run a recipe that is already read."""
    from secateur import pipeline
    from secateur.cli.console import progress_for, quiet_libraries
    from secateur.pipeline import processes

    quiet_libraries()
    with progress_for(as_json, quiet or not processes.is_main()) as progress:
        result = pipeline.run(recipe, until=until, progress=progress)
    if not processes.is_main():
        click.get_current_context().exit()  # the main process says what was made
    return result


def describe_result(result: RunResult) -> dict[str, Any]:
    """Return what a run made, as plain data for ``--json``."""
    data: dict[str, Any] = {"output": str(result.folder), "reused": result.reused}
    data["statistics"] = {
        name: {"tokens": s.num_tokens, "tokens_per_s": s.tokens_per_s, "fingerprint": s.corpus_fingerprint}
        for name, s in result.statistics.items()
    }
    if result.plan is not None:
        data["parameters"] = {"dense": result.plan.total_dense, "pruned": result.plan.total_pruned}
        data["plan"] = str(result.folder / "plan.json")
        data["notes"] = [*result.plan.notes, *result.notes]
    if result.model_folder is not None:
        data["model"] = str(result.model_folder)
    if result.recoveries:
        data["recoveries"] = {name: recovery.to_dict() for name, recovery in result.recoveries.items()}
    if result.page is not None:
        data["page"] = str(result.page)
    if result.generations is not None:
        data["generations"] = result.generations.to_dict()
    if result.tasks is not None:
        data["tasks"] = _without_samples(result.tasks.to_dict())
    if result.speed is not None:
        data["speed"] = result.speed.to_dict()
    if result.exports:
        data["exports"] = [exported.to_dict() for exported in result.exports]
    if result.evaluation is not None:
        evaluation = result.evaluation.to_dict()
        scores = [score for model in evaluation["models"].values() for score in model["text"].values()]
        scores += [
            effect[kind] for effect in evaluation["vocabulary"].values() for kind in ("resegmented", "restricted")
        ]
        for score in scores:
            for key in ("document_nll", "document_tokens", "document_bytes"):
                del score[key]
        data |= {"evaluation": evaluation, "summary": result.summary}
    return data


def _without_samples(tasks: dict[str, Any]) -> dict[str, Any]:
    """Return results of tasks without the numbers of single documents."""
    for row in tasks["models"].values():
        for score in row.values():
            for metric in score["metrics"]:
                del metric["samples"]
    return tasks
