"""``secateur chat``."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("chat")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", help="Answer this and end.")
@click.option("--system", default="", help="System prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of one answer, at most."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="0: the likeliest token each time. Default: the model's own."
)
@click.option("--device", default="auto", show_default=True, help="For a folder: auto, cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; needs --prompt.")
def command(
    model: Path,
    prompt: str | None,
    system: str,
    max_new_tokens: int,
    temperature: float | None,
    device: str,
    as_json: bool,
) -> None:
    """Talk to MODEL: a model folder, a run's folder (its recovered model, if any), or a GGUF file.

    A folder runs in transformers; a GGUF file in llama.cpp (llama-server on PATH, or xllamacpp). Ctrl-D or Ctrl-C ends
    the talk. A model without a chat template continues each text that it is given.
    """
    from secateur.cli.console import print_json, quiet_libraries
    from secateur.errors import ConfigError
    from secateur.export.chat import Settings, converse, open_talker, reply
    from secateur.export.given import given_model

    quiet_libraries()
    if as_json and prompt is None:
        raise ConfigError("a conversation is no JSON object. Give --prompt, or leave --json out.")
    place = given_model(model)
    settings = Settings(max_new_tokens=max_new_tokens, temperature=temperature, system=system)
    try:
        with open_talker(place, settings, device=device) as talker:
            if prompt is not None and as_json:
                print_json({"model": str(place), "answer": reply(talker, settings, prompt, lambda _: None)})
                return
            if prompt is not None:
                reply(talker, settings, prompt, _write)
                _write("\n")
                return
            kind = "chat" if talker.remembers else "no chat template: it continues what you write"
            click.echo(f"{place} ({kind}). Ctrl-D ends.", err=True)
            converse(talker, settings, _read, _write)
    except KeyboardInterrupt:
        pass
    click.echo(err=True)


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _read() -> str:
    if sys.stdin.isatty():
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
