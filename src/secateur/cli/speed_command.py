"""``secateur speed``."""

from __future__ import annotations

import click


@click.command("speed")
@click.argument("dense")
@click.argument("others", nargs=-1, required=True, metavar="PRUNED...")
@click.option("--prompt-lengths", metavar="N,N", help="Tokens of a prompt, separated by commas.  [default: 128,512]")
@click.option("--batch-sizes", metavar="N,N", help="Prompts read together, separated by commas.  [default: 1,4]")
@click.option("--new-tokens", type=click.IntRange(min=2), help="Tokens added to each prompt.  [default: 32]")
@click.option("--rounds", type=click.IntRange(min=1), help="How often every model does everything.  [default: 5]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
    default="auto",
    show_default=True,
    help="That all models compute in.",
)
@click.option("--peak/--no-peak", default=True, help="Measure the peak of memory; on a CPU each model is loaded again.")
@click.option("--trust-remote-code", is_flag=True, help="Let a model bring its own Python code.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every round instead of tables.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(
    dense: str,
    others: tuple[str, ...],
    prompt_lengths: str | None,
    batch_sizes: str | None,
    new_tokens: int | None,
    rounds: int | None,
    device: str,
    dtype: str,
    peak: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how large and how fast PRUNED models are beside DENSE, on this machine.

    Each is a model folder, the folder of a run, a hub id or a .gguf file. All models do the same in every round, one
    right after the other, so that what else the machine does slows all of them. Prompts are ids drawn at random.
    """
    from secateur.cli.console import print_json, print_table, progress_for, quiet_libraries
    from secateur.pipeline.speed import measure_folders
    from secateur.recipe import parse_speed
    from secateur.report.speed import describe_measurement, describe_speed, footprint_table, timings_table

    quiet_libraries()
    said = {
        "prompt_lengths": _numbers(prompt_lengths, "--prompt-lengths"),
        "batch_sizes": _numbers(batch_sizes, "--batch-sizes"),
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    spec = parse_speed({key: value for key, value in said.items() if value is not None})
    with progress_for(as_json, quiet) as progress:
        speed = measure_folders(
            [dense, *others],
            spec,
            device=device,
            dtype=dtype,
            with_peaks=peak,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(speed.to_dict())
        return
    print_table(footprint_table(speed))
    print_table(timings_table(speed))
    click.echo("\n".join([*describe_measurement(speed), *describe_speed(speed)]))


def _numbers(text: str | None, option: str) -> list[int] | None:
    """Return the whole numbers in a text with commas between them.

    Raises:
        ConfigError: it is something else.
    """
    from secateur.errors import ConfigError

    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; give whole numbers with commas between, such as 128,512.") from None
