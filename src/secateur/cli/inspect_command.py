"""``secateur inspect``."""

from __future__ import annotations

import click


@click.command("inspect")
@click.argument("model")
@click.option("--layers", is_flag=True, help="One row per layer as well.")
@click.option("--trust-remote-code", is_flag=True, help="Let a model bring its own Python code.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(model: str, layers: bool, trust_remote_code: bool, as_json: bool) -> None:
    """Show where the parameters of MODEL are: a local folder, a hub id or a .gguf file.

    Weights are not loaded.
    """
    from secateur.cli.console import print_json, print_table, quiet_libraries
    from secateur.report.inspection import inspect_parameters, layers_table, overview_table
    from secateur.store.checkpoints import resolve_model

    quiet_libraries()
    checkpoint = resolve_model(model, trust_remote_code=trust_remote_code)
    inspection = inspect_parameters(checkpoint.shapes, checkpoint.geometry)
    if as_json:
        print_json(
            {
                "model": model,
                "family": checkpoint.geometry.family.name,
                "dtype": str(checkpoint.dtype).removeprefix("torch."),
                "size_bytes": checkpoint.size_bytes,
                **inspection.to_dict(),
            }
        )
        return
    print_table(overview_table(inspection, checkpoint.dtype.itemsize))
    if layers:
        print_table(layers_table(inspection))
    units = ", ".join(
        f"{min(counts):,}" + (f" to {max(counts):,}" if min(counts) != max(counts) else "") + f" {kind}s"
        for kind, counts in inspection.units.items()
    )
    click.echo(f"family {checkpoint.geometry.family.name}, {checkpoint.geometry.num_layers} layers, each with {units}")
    for kind, reason in inspection.fixed.items():
        click.echo(f"{kind}s cannot be cut: {reason}")
