"""``secateur calibrate``."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.recipe_options import RecipeOptions, describe_result, recipe_options, run_recipe


@click.command("calibrate")
@recipe_options
def command(**arguments: Any) -> None:
    """Run RECIPE's text through the dense model once and keep the statistics.

    Every method, budget and shape is planned from them without a second pass.
    """
    from secateur.cli.console import print_json, print_table
    from secateur.report.tables import Table

    options = RecipeOptions(**arguments)
    result = run_recipe(options, "calibrate")
    if options.as_json:
        print_json(describe_result(result))
        return
    rows = [
        [name, f"{s.num_tokens:,}", f"{len(s.documents):,}", f"{s.tokens_per_s:,.0f}", s.corpus_fingerprint[:12]]
        for name, s in result.statistics.items()
    ]
    print_table(Table("calibration", ["bucket", "tokens", "documents", "tokens/s", "fingerprint"], rows))
    click.echo(f"statistics: {result.folder / 'statistics'}\nnext: secateur plan {options.recipe}")
