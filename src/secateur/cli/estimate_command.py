"""``secateur estimate``."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.recipe_options import RecipeOptions, recipe_options


@click.command("estimate")
@recipe_options
@click.option("--probe/--no-probe", default=True, help="Measure this machine for about ten seconds (the default).")
def command(probe: bool, **arguments: Any) -> None:
    """Predict what a run of RECIPE takes, stage by stage: seconds, peak memory, disk. Nothing of it is run.

    No weight is loaded. A probe times one decoder layer of the model's shapes; without it the rates of the last probe
    are used. Where memory or disk are too small, it says which setting to change, and how much that saves.
    """
    from secateur.cli.console import print_json, print_table, progress_for, quiet_libraries
    from secateur.recipe import load_recipe
    from secateur.report.estimate import advice_table, memory_table, sentences, stages_table

    options = RecipeOptions(**arguments)
    recipe = load_recipe(options.recipe, options.overrides())
    quiet_libraries()
    from secateur.estimate import estimate

    with progress_for(options.as_json, options.quiet) as progress:
        found = estimate(recipe, probe=probe, progress=progress)
    if options.as_json:
        print_json(found.to_dict())
        return
    for table in (stages_table(found), memory_table(found), advice_table(found)):
        if table.rows:
            print_table(table)
    for sentence in sentences(found):
        click.echo(sentence)
