"""``secateur export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", default="gguf", show_default=True, metavar="TARGET", help="gguf, uniform, nemotron-nas or onnx.")
@click.option("--quantize", "-q", metavar="TYPE", help="Such as Q8_0; for gguf F16 by default.")
@click.option("--round-to-fit", is_flag=True, help="Fill sizes that do not fit up with zeros.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Default: beside FOLDER, named after it.")
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text, one a line.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run it in its engine and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    to: str,
    quantize: str | None,
    round_to_fit: bool,
    output: Path | None,
    prompts: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Write the model in FOLDER in another form, such as a GGUF file for llama.cpp.

    What was written is read back and compared with the model; where the engine is installed (for gguf xllamacpp) it is
    also run there, and its next-token probabilities are compared with transformers'. It gets its name only then. A file
    that the engine runs as another model is kept under a name that says so, and the exit code is 1.
    """
    from secateur.cli.console import print_json, quiet_libraries
    from secateur.export.targets import export_folder
    from secateur.report.tables import format_bytes

    quiet_libraries()
    made = export_folder(
        folder,
        output,
        to,
        quantize=quantize,
        round_to_fit=round_to_fit,
        verify=verify,
        prompts=prompts.read_text(encoding="utf-8").splitlines() if prompts is not None else (),
    )
    if as_json:
        print_json(made.to_dict())
        return
    click.echo(f"{made.path}: {format_bytes(made.size_bytes)}, {made.form}")
    for sentence in made.sentences():
        click.echo(sentence)
