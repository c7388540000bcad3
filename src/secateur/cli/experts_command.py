"""``secateur experts``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from secateur.cli.recipe_options import RecipeOptions, recipe_options

if TYPE_CHECKING:
    from secateur.pipeline.trials import TrialResult


@click.command("experts")
@recipe_options
@click.option("--only", metavar="LIST", help="Domains to make an expert of now, such as medical,legal.")
@click.option("--max-time", metavar="TIME", help="Begin no further expert after that, such as 30m; resume later.")
def command(only: str | None, max_time: str | None, **arguments: Any) -> int:
    """Make one expert for each of RECIPE's domains, over one calibration, and measure each on all of them.

    Every expert is a whole run with its model, in trials/DOMAIN of the output: cut and trained on its domain's text
    alone, and exported as the recipe says. Experts that are there are reused.
    """
    from secateur.cli.console import print_json, print_table, progress_for, quiet_libraries
    from secateur.cli.limits import seconds_of
    from secateur.pipeline.experts import run_experts
    from secateur.recipe import load_recipe
    from secateur.report.experts import experts_notes, experts_tables, experts_verdict

    options = RecipeOptions(**arguments)
    recipe = load_recipe(options.recipe, options.overrides())
    chosen = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    seconds = seconds_of(max_time)
    quiet_libraries()
    with progress_for(options.as_json, options.quiet) as progress:
        result = run_experts(
            recipe,
            only=chosen,
            max_time=seconds,
            progress=progress,
            on_result=lambda one: None if options.as_json or options.quiet else _say(one),
        )
    verdict, code = experts_verdict(result.family), 1 if result.unverified else 0
    if options.as_json:
        page = {"page": str(result.page)} if result.page else {}
        data = {"output": str(result.folder), "reused": list(result.reused), **page, "summary": verdict}
        print_json({**data, **result.family.to_dict()})
        return code
    for table in experts_tables(result.family):
        print_table(table)
    for note in experts_notes(result.family):
        click.echo(f"note: {note}")
    click.echo(verdict)
    click.echo("")
    for one in result.family.experts:
        click.echo(f"{one.name}: {one.model}")
    click.echo(f"experts: {result.folder / 'experts.json'}")
    click.echo(f"page:    {result.page}  (open it in a browser)" if result.page else f"no page: {result.no_page}")
    return code


def _say(result: TrialResult) -> None:
    """Tell how an expert came out, to whoever watches."""
    told = "already there" if result.reused else f"{result.seconds:.0f} s"
    done = result.status == "done"
    click.echo(f"{result.trial.name}: {told if done else f'{result.status}: {result.message}'}", err=True)
