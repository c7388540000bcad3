"""``secateur report``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from secateur.report.page import Document

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("report")
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--svg", type=_FOLDER, metavar="DIR", help="Write every chart as an SVG file as well.")
@click.option("--png", type=_FOLDER, metavar="DIR", help="Write every chart as a PNG file as well.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(run_folder: Path, svg: Path | None, png: Path | None, as_json: bool) -> None:
    """Build the page report.html of RUN_FOLDER again from the results in it; no model is loaded.

    RUN_FOLDER is that of a run, of a sweep, of a domain matrix or of a family of experts.

    The page is one file without links: it opens from disk, prints, and can be sent to others. It needs the package
    vl-convert-python (pip install 'secateur[report]').
    """
    from secateur.cli.console import print_json, quiet_libraries
    from secateur.report.page import save_charts
    from secateur.store.artifacts import disk_errors

    quiet_libraries()
    write, document_of = _kind_of(run_folder)
    page, charts = write(run_folder), []
    if svg is not None or png is not None:
        with disk_errors(svg or png or run_folder):
            charts = save_charts(document_of(run_folder), svg=svg, png=png)
    if as_json:
        print_json({"page": str(page), "charts": [str(file) for file in charts]})
        return
    click.echo(f"page: {page}")
    for file in charts:
        click.echo(f"chart: {file}")


def _kind_of(folder: Path) -> tuple[Callable[[Path], Path], Callable[[Path], Document]]:
    """Return what writes the page of a folder, and what reads it from there."""
    from secateur.pipeline import experts
    from secateur.pipeline.matrix import MATRIX, document_of, write_matrix_page
    from secateur.pipeline.page import read_run, write_page
    from secateur.pipeline.sweep import is_sweep, read_sweep, write_sweep_page
    from secateur.report.page import run_document
    from secateur.report.page.sweep import sweep_document

    if is_sweep(folder):
        return write_sweep_page, lambda folder: sweep_document(read_sweep(folder))
    if (folder / MATRIX).is_file():
        return write_matrix_page, document_of
    if (folder / experts.EXPERTS).is_file():
        return experts.write_experts_page, experts.document_of
    return write_page, lambda folder: run_document(read_run(folder))
