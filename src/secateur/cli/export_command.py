"""``secateur export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "kind", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="What to write.")
@click.option("--quantize", "-q", default="F16", show_default=True, metavar="TYPE", help="Such as F16 or Q8_0.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Default: FOLDER.TYPE.gguf.")
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text, one a line.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run the file in llama.cpp and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path, kind: str, quantize: str, output: Path | None, prompts: Path | None, verify: bool, as_json: bool
) -> None:
    """Write the model in FOLDER as a GGUF file for llama.cpp.

    The file is read back and compared with the model; where xllamacpp is installed it is also run in llama.cpp, and its
    next-token probabilities are compared with transformers'. A file that fails is kept under a name that says so.
    """
    from dataclasses import asdict

    from secateur.cli.console import print_json, quiet_libraries
    from secateur.errors import ExportError, UnavailableError
    from secateur.export.gguf import export_gguf
    from secateur.export.llama_cpp import verify_in_llama_cpp
    from secateur.report.tables import format_bytes

    del kind  # the only one so far
    quiet_libraries()
    target = output or folder.resolve().with_name(f"{folder.resolve().name}.{quantize.upper()}.gguf")
    texts = prompts.read_text(encoding="utf-8").splitlines() if prompts is not None else list(_PROMPTS)
    report = export_gguf(folder, target, quantize=quantize)
    checked, skipped = None, "" if verify else "--no-verify was given"
    if verify:
        try:
            checked = verify_in_llama_cpp(report.file, folder, [text for text in texts if text.strip()])
        except UnavailableError as error:
            skipped = str(error)
        except ExportError as error:
            failed = target.with_name(f"{target.stem}.failed-verification.gguf")
            target.replace(failed)
            raise ExportError(f"{error} The file is kept as {failed}.") from None
    if as_json:
        facts = {**asdict(report), "file": str(report.file)}
        print_json({**facts, "verified": None if checked is None else asdict(checked), "not_verified": skipped})
        return
    click.echo(f"{report.file}: {format_bytes(report.size_bytes)}, {report.architecture}, {report.quantization}")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo("read back and compared: every tensor and key agrees with the model")
    if checked is None:
        click.echo(f"not run in llama.cpp: {skipped}")
        return
    click.echo(
        f"run in llama.cpp (xllamacpp {checked.version}): {checked.num_texts} texts cut into the same tokens, "
        f"{checked.same_first} of {checked.num_prompts} prompts have the same likeliest next token, log-probabilities "
        f"differ by {checked.mean_difference:.4f} nats on average (allowed: {checked.tolerance:g})"
    )


_PROMPTS = (
    "The patient was admitted to hospital with",
    "Question: What are the symptoms of iron deficiency?\nAnswer:",
    "In 1969 the first people to walk on the Moon",
    "The contract shall be governed by the laws of",
    "def mean(values):\n    return",
    "The largest river of the continent flows through",
)
"""What the comparison reads where no prompts are given."""
