"""``secateur plan``."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.recipe_options import RecipeOptions, describe_result, recipe_options, run_recipe


@click.command("plan")
@recipe_options
def command(**arguments: Any) -> None:
    """Decide what stays in RECIPE's model, and show it as a table; nothing is cut yet.

    Calibrates first if that was not done. The plan is a JSON file: read it, edit it, then `secateur shrink`.
    """
    from secateur.cli.console import print_json, print_table
    from secateur.report.tables import cut_table, parts_table, plan_table, removed_blocks, vocabulary_table

    options = RecipeOptions(**arguments)
    result = run_recipe(options, "plan")
    if options.as_json:
        print_json(describe_result(result))
        return
    assert result.plan is not None
    if result.plan.layers:
        print_table(plan_table(result.plan))
    if result.plan.vocabulary is not None:
        print_table(vocabulary_table(result.plan.vocabulary))
    print_table(cut_table(result.plan))
    print_table(parts_table(result.plan.parameters_dense, result.plan.parameters_pruned))
    if blocks := removed_blocks(result.plan):
        click.echo(blocks)
    for note in result.plan.notes:
        click.echo(f"note: {note}")
    click.echo(f"plan: {result.folder / 'plan.json'}\nnext: secateur shrink {options.recipe}")
