"""``secateur recover``."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.recipe_options import RecipeOptions, describe_result, recipe_options, run_recipe


@click.command("recover")
@recipe_options
def command(**arguments: Any) -> None:
    """Train RECIPE's pruned model on its domain's text, as the recipe's recover section says.

    Calibrates, plans and shrinks first if that was not done. A training that was stopped goes on where it was.
    """
    from secateur.cli.console import print_json, print_table
    from secateur.pipeline.processes import is_main
    from secateur.report.recovery import curve_table, describe_recovery

    options = RecipeOptions(**arguments)
    result = run_recipe(options, "recover")
    if not is_main():
        return
    if options.as_json:
        print_json(describe_result(result))
        return
    print_table(curve_table(result.recoveries))
    for recovery in result.recoveries.values():
        click.echo(describe_recovery(recovery))
    click.echo(f"model: {result.model_folder}  ({result.checked})")
    click.echo(f"next: secateur evaluate {options.recipe}")
