"""``secateur shrink``."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.recipe_options import RecipeOptions, describe_result, recipe_options, run_recipe


@click.command("shrink")
@recipe_options
def command(**arguments: Any) -> None:
    """Cut RECIPE's model as planned, save it, reload it from disk and compare.

    Calibrates and plans first if that was not done.
    """
    from secateur.cli.console import print_json, print_table
    from secateur.report.tables import parts_table

    options = RecipeOptions(**arguments)
    result = run_recipe(options, "shrink")
    if options.as_json:
        print_json(describe_result(result))
        return
    assert result.plan is not None
    print_table(parts_table(result.plan.parameters_dense, result.plan.parameters_pruned))
    click.echo(f"model: {result.model_folder}  ({result.checked})")
    click.echo(f"next: secateur evaluate {options.recipe}")
