"""``secateur evaluate``."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.recipe_options import RecipeOptions, recipe_options, run_recipe
from secateur.cli.run_command import show_run


@click.command("evaluate")
@recipe_options
def command(**arguments: Any) -> None:
    """Measure the dense, pruned and control models of RECIPE on held-out text.

    Documents that were calibrated on are never measured. Earlier stages run first if they were not done.
    """
    options = RecipeOptions(**arguments)
    show_run(run_recipe(options, "evaluate"), as_json=options.as_json)
