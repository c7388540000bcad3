"""``secateur methods``."""

from __future__ import annotations

import click


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(as_json: bool) -> None:
    """List the scoring methods: what each measures, what it needs, and where it comes from."""
    from secateur.cli.console import print_json, print_table
    from secateur.report.tables import Table
    from secateur.score import METHODS

    if as_json:
        fields = ("measures", "formula", "needs", "cost", "caveat", "source", "control", "kinds")
        print_json({name: {field: getattr(method, field) for field in fields} for name, method in METHODS.items()})
        return
    rows = [[m.name, m.measures, ", ".join(m.kinds), m.needs, m.source] for m in METHODS.values()]
    print_table(Table("methods", ["name", "measures", "scores", "needs", "source"], rows))
