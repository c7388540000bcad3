"""``secateur compare``."""

from __future__ import annotations

from pathlib import Path

import click

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(file_okay=False, path_type=Path))
@click.option("--baseline", metavar="RUN", help="What the others are compared with; by default the first.")
@click.option("--bucket", "buckets", multiple=True, help="Compare on this text only; once per bucket.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write a page with charts as well.")
@click.option("--md", type=_FILE, metavar="FILE", help="Write the tables as Markdown as well.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    runs: tuple[Path, ...],
    baseline: str | None,
    buckets: tuple[str, ...],
    html: Path | None,
    md: Path | None,
    as_json: bool,
) -> None:
    """Set two or more finished runs side by side: results, differences with confidence, plans and recipes.

    Every RUN is a run folder. Differences are paired by document, so they are surer than two error bars suggest. Runs
    that were measured on different test text are refused.
    """
    from secateur.cli.console import print_json, print_table, quiet_libraries
    from secateur.pipeline.compare import compare
    from secateur.report.comparison import (
        comparison_markdown,
        comparison_notes,
        comparison_tables,
        comparison_verdict,
    )
    from secateur.store.artifacts import write_text

    quiet_libraries()
    comparison = compare(runs, baseline=baseline, buckets=buckets or None)
    verdict = comparison_verdict(comparison)
    if html is not None:
        from secateur.report.page.compare import comparison_document
        from secateur.report.page.render import render_page

        write_text(html, render_page(comparison_document(comparison)))
    if md is not None:
        write_text(md, comparison_markdown(comparison))
    if as_json:
        files = {name: str(file) for name, file in (("page", html), ("markdown", md)) if file is not None}
        print_json({**comparison.to_dict(), "summary": verdict, **files})
        return
    for table in comparison_tables(comparison):
        print_table(table)
    for note in comparison_notes(comparison):
        click.echo(f"note: {note}")
    click.echo(verdict)
    for name, file in (("page", html), ("tables", md)):
        if file is not None:
            click.echo(f"{name}: {file}")
