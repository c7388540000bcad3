"""``secateur report``."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("report")
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--svg", type=_FOLDER, metavar="DIR", help="Write every chart as an SVG file as well.")
@click.option("--png", type=_FOLDER, metavar="DIR", help="Write every chart as a PNG file as well.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(run_folder: Path, svg: Path | None, png: Path | None, as_json: bool) -> None:
    """Build the page report.html of RUN_FOLDER again from the results in it; no model is loaded.

    The page is one file without links: it opens from disk, prints, and can be sent to others. It needs the package
    vl-convert-python (pip install 'secateur[report]').
    """
    from secateur.cli.console import print_json, quiet_libraries
    from secateur.pipeline.page import read_run, write_page
    from secateur.report.page import run_document, save_charts
    from secateur.store.artifacts import disk_errors

    quiet_libraries()
    page, charts = write_page(run_folder), []
    if svg is not None or png is not None:
        with disk_errors(svg or png or run_folder):
            charts = save_charts(run_document(read_run(run_folder)), svg=svg, png=png)
    if as_json:
        print_json({"page": str(page), "charts": [str(file) for file in charts]})
        return
    click.echo(f"page: {page}")
    for file in charts:
        click.echo(f"chart: {file}")
