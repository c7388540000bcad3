"""``secateur run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from secateur.cli.recipe_options import RecipeOptions, describe_result, recipe_options, run_recipe

if TYPE_CHECKING:
    from secateur.pipeline import RunResult


@click.command("run")
@recipe_options
def command(**arguments: Any) -> None:
    """Do the whole job of RECIPE: calibrate, plan, shrink, recover (where it says how), evaluate, export.

    Finished stages are kept in the run folder and reused, so the same command resumes after a stop and a changed
    budget costs no second calibration.
    """
    options = RecipeOptions(**arguments)
    show_run(run_recipe(options, "export"), as_json=options.as_json)


def show_run(result: RunResult, *, as_json: bool) -> None:
    """Print the end of a full run."""
    from secateur.cli.console import print_json, print_table
    from secateur.report.choices import choices_sentences, choices_table, paired_answers_table
    from secateur.report.generations import agreement_table
    from secateur.report.recovery import curve_table, describe_recovery
    from secateur.report.speed import describe_measurement, describe_speed, footprint_table, timings_table
    from secateur.report.tables import (
        SEGMENTATION_NOTE,
        attribution_table,
        cut_table,
        format_bytes,
        parts_table,
        result_table,
        segmentation_table,
    )
    from secateur.report.tasks import describe_tasks, tasks_table

    if as_json:
        print_json(describe_result(result))
        return
    assert result.plan is not None and result.evaluation is not None and result.model_folder is not None
    print_table(parts_table(result.plan.parameters_dense, result.plan.parameters_pruned))
    if result.plan.vocabulary is not None:
        print_table(cut_table(result.plan))
        print_table(segmentation_table(result.evaluation))
    if result.recoveries:
        print_table(curve_table(result.recoveries))
    print_table(result_table(result.evaluation))
    for table in (choices_table(result.evaluation), paired_answers_table(result.evaluation)):
        if table.rows:
            print_table(table)
    for sentence in choices_sentences(result.evaluation):
        click.echo(sentence)
    if result.plan.vocabulary is not None:
        print_table(attribution_table(result.evaluation))
        click.echo(SEGMENTATION_NOTE)
    if result.speed is not None:
        print_table(footprint_table(result.speed))
        print_table(timings_table(result.speed))
        click.echo("\n".join([*describe_measurement(result.speed), *describe_speed(result.speed)]))
    if result.tasks is not None:
        print_table(tasks_table(result.tasks))
        click.echo("\n".join(describe_tasks(result.tasks)))
    if result.generations is not None:
        print_table(agreement_table(result.generations))
    for recovery in result.recoveries.values():
        click.echo(describe_recovery(recovery))
    for note in (*result.plan.notes, *result.notes):
        click.echo(f"note: {note}")
    click.echo(result.summary)
    click.echo(f"\nmodel:  {result.model_folder}  ({result.checked})")
    for exported in result.exports:
        click.echo(f"export: {exported.path}  ({exported.form}, {format_bytes(exported.size_bytes)})")
        for sentence in exported.sentences():
            click.echo(f"        {sentence}")
    click.echo(f"report: {result.folder / 'report.md'}")
    click.echo(f"page:   {result.page}  (open it in a browser)" if result.page else f"no page: {result.no_page}")
    loader = "import secateur; " if result.plan.shape == "uneven" else ""
    click.echo(f"use it: {loader}AutoModelForCausalLM.from_pretrained({str(result.model_folder)!r})")
