"""``secateur serve``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serve")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="For a GGUF file: of an answer whose request sets no limit."
)
@click.option("--device", default="auto", show_default=True, help="For a folder: auto, cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the address and the model's name as one JSON object.")
def command(model: Path, host: str, port: int, max_new_tokens: int | None, device: str, as_json: bool) -> None:
    """Serve MODEL over HTTP, for programs that speak OpenAI's API: a model folder, a run's folder, or a GGUF file.

    A folder is served by transformers (pip install "transformers[serving]"), a GGUF file by llama.cpp (llama-server on
    PATH, or xllamacpp). Ctrl-C ends it.
    """
    from secateur.cli.console import print_json, quiet_libraries
    from secateur.export.given import given_model
    from secateur.export.serve import check_serving, serve

    quiet_libraries()
    place = given_model(model)
    check_serving(place, host, port, max_new_tokens=max_new_tokens)
    address, name = f"http://{host}:{port}/v1", place.resolve().name
    if as_json:
        print_json({"model": name, "address": address})
    else:
        click.echo(f"{place} at {address}, as model {name!r} (Ctrl-C ends it)", err=True)
    serve(place, host, port, device=device, max_new_tokens=max_new_tokens)
