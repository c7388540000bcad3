"""``secateur matrix``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from secateur.cli.recipe_options import RecipeOptions, recipe_options

if TYPE_CHECKING:
    from secateur.pipeline.trials import TrialResult


@click.command("matrix")
@recipe_options
@click.option("--budgets", metavar="LIST", help="Shares to repeat it at, such as 0.1,0.2; wins over the recipe's.")
@click.option("--max-time", metavar="TIME", help="Start no further model after that, such as 30m; resume later.")
@click.option("--keep-models", is_flag=True, help="Keep the pruned models; else they go once they are measured.")
def command(budgets: str | None, max_time: str | None, keep_models: bool, **arguments: Any) -> None:
    """Prune on each of RECIPE's domains alone, and measure every result on all of them.

    Shows whether the calibration text matters: each domain's own model beside those of the other domains, of general
    text (where the recipe has it) and a random cut. Models that are measured are kept and reused.
    """
    from secateur.cli.console import print_json, print_table, progress_for, quiet_libraries
    from secateur.cli.limits import seconds_of
    from secateur.pipeline.matrix import run_matrix
    from secateur.recipe import load_recipe
    from secateur.report.matrix import matrix_notes, matrix_tables, matrix_verdict

    options = RecipeOptions(**arguments)
    recipe = load_recipe(options.recipe, options.overrides())
    shares, seconds = _shares(budgets), seconds_of(max_time)
    quiet_libraries()
    with progress_for(options.as_json, options.quiet) as progress:
        result = run_matrix(
            recipe,
            budgets=shares,
            max_time=seconds,
            keep_models=keep_models,
            progress=progress,
            on_result=lambda one: None if options.as_json or options.quiet else _say(one),
        )
    verdict = matrix_verdict(result.matrix)
    if options.as_json:
        page = {"page": str(result.page)} if result.page else {}
        data = {"output": str(result.folder), "reused": list(result.reused), **page, "summary": verdict}
        print_json({**data, "matrix": result.matrix.to_dict()})
        return
    for table in matrix_tables(result.matrix):
        print_table(table)
    for note in matrix_notes(result.matrix):
        click.echo(f"note: {note}")
    click.echo(verdict)
    click.echo(f"\nmatrix: {result.folder / 'matrix.json'}")
    click.echo(f"page:   {result.page}  (open it in a browser)" if result.page else f"no page: {result.no_page}")


def _say(result: TrialResult) -> None:
    """Tell how a model came out, to whoever watches."""
    told = "already there" if result.reused else f"{result.seconds:.0f} s"
    done = result.status == "done"
    click.echo(f"{result.trial.name}: {told if done else f'{result.status}: {result.message}'}", err=True)


def _shares(text: str | None) -> list[float] | None:
    from secateur.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"cannot read --budgets {text!r}; write shares with commas, for example 0.1,0.2") from None
