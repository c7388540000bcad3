"""The ``secateur`` command: finds commands, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 an exported file failed its verification in the engine; 2 something the user can mend; 130
stopped by Ctrl-C (a run resumes when called again).
"""

from __future__ import annotations

import importlib
import json
import sys

import click

from secateur import __version__
from secateur.errors import SecateurError
from secateur.registry import unknown_name

COMMANDS = {
    "run": "Do the whole job of a recipe: calibrate, plan, shrink, recover, evaluate, export.",
    "estimate": "Predict time, memory and disk of a run, and what to change where it does not fit.",
    "calibrate": "Run the recipe's text through the dense model and keep the statistics.",
    "plan": "Decide what stays, and show it as a table before anything is cut.",
    "shrink": "Cut the model, save it, reload it and compare.",
    "recover": "Train the pruned model on its domain's text.",
    "evaluate": "Measure dense, pruned and control models on held-out text.",
    "export": "Write a model folder in another form, such as a GGUF file for llama.cpp, and compare.",
    "report": "Build the page report.html of a finished run again, and its charts as files.",
    "compare": "Set finished runs side by side: results, differences with confidence, plans, recipes.",
    "matrix": "Prune on each domain alone and measure on all: does the calibration text matter?",
    "experts": "Make one expert per domain, over one calibration, and measure each on all of them.",
    "sweep": "Run a recipe with parts of it varied, and map size against quality.",
    "speed": "Measure how large and how fast models are on this machine, in turn.",
    "chat": "Talk to a pruned model, in transformers or llama.cpp.",
    "serve": "Serve a pruned model over HTTP, by transformers' or llama.cpp's server.",
    "push": "Send a pruned model to the Hugging Face hub, after checks.",
    "choices": "Make sets of multiple-choice questions from a corpus.",
    "inspect": "Show where a model's parameters are.",
    "vocabulary": "Show which token ids a domain's text uses, and what cutting the others would cost.",
    "methods": "List the scoring methods.",
    "demo": "Do the main job on a small real model and real text, fetched on first use.",
}


class _LazyGroup(click.Group):
    """Imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            raise click.UsageError(unknown_name("command", cmd_name, COMMANDS), ctx)
        module = importlib.import_module(f"secateur.cli.{cmd_name}_command")
        command: click.Command = module.command
        command.short_help = COMMANDS[cmd_name]
        return command


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="secateur")
def cli() -> None:
    """Cut an open language model down to the smallest expert that is still as good on your domain's text."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; None takes the process's own. Without any, the help is shown.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = cli.main(arguments, prog_name="secateur", standalone_mode=False) or 0
    except click.ClickException as error:
        code = _fail(error.format_message(), type(error).__name__, arguments)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)
    except SecateurError as error:
        code = _fail(str(error), type(error).__name__, arguments, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command continues where this one was.", err=True)
        code = 130
    except MemoryError:
        code = _fail(_OUT_OF_MEMORY, "MemoryError", arguments)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        code = _fail(_OUT_OF_MEMORY, "MemoryError", arguments)
    sys.exit(code)


_OUT_OF_MEMORY = "out of memory. Lower calibrate.batch_size and evaluate.batch_size, then calibrate.block_size."


def _fail(message: str, kind: str, arguments: list[str], code: int = 2) -> int:
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"type": kind, "message": message}}))
    click.echo(f"error: {message}", err=True)
    return code


if __name__ == "__main__":
    main()
