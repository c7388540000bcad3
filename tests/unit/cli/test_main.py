"""The ``secateur`` command: which commands there are, and how errors become messages and exit codes."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest

import secateur
from secateur import errors
from secateur.cli import main as entry
from secateur.cli.main import COMMANDS, cli
from tests.command import call


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ``secateur methods`` raise what the test gives it."""
    from secateur.cli import methods_command

    def arrange(error: BaseException) -> None:
        def command() -> None:
            raise error

        as_json = click.Option(["--json"], is_flag=True, expose_value=False)
        monkeypatch.setattr(methods_command, "command", click.Command("methods", callback=command, params=[as_json]))

    return arrange


def test_every_command_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The overview names all commands, and each explains itself and its options."""
    overview = call(capsys, "--help")
    assert overview.code == 0
    for name, summary in COMMANDS.items():
        assert name in overview.out
        assert summary.split()[0] in overview.out
        shown = call(capsys, name, "--help")
        assert shown.code == 0 and shown.err == ""
        assert f"Usage: secateur {name}" in shown.out
        assert "--json" in shown.out


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing a newcomer types is no error."""
    shown = call(capsys)
    assert shown.code == 0
    assert shown.out == call(capsys, "--help").out


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the package's."""
    assert call(capsys, "--version").out == f"secateur, version {secateur.__version__}\n"


def test_the_process_arguments_are_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the installed script calls it."""
    monkeypatch.setattr("sys.argv", ["secateur", "--version"])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 0
    assert "version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], ["unknown command 'rum'", "Did you mean 'run'?", "calibrate", "Try 'secateur --help'"]),
        (["run"], ["Missing argument 'RECIPE'", "Try 'secateur run --help'"]),
        (["run", "--metod", "x", "r.yml"], ["No such option", "--method", "Try 'secateur run --help'"]),
        (["methods", "extra"], ["unexpected extra argument", "extra"]),
        (["inspect"], ["Missing argument 'MODEL'"]),
        (["run", "."], ["is a directory"]),
    ],
)
def test_a_slip_on_the_command_line_is_answered(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    """Exit code 2, what is wrong, what was meant, and where help is; on stderr, without a traceback."""
    answer = call(capsys, *arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    for word in words:
        assert word in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("kind", errors.SecateurError.__subclasses__())
def test_our_errors_exit_with_2(capsys: pytest.CaptureFixture[str], broken: Any, kind: type[Exception]) -> None:
    """The message alone on stderr; with --json also an object on stdout that names the kind."""
    broken(kind("this is wrong. Do that."))
    plain = call(capsys, "methods")
    assert (plain.code, plain.out, plain.err) == (2, "", "error: this is wrong. Do that.\n")
    machine = call(capsys, "methods", "--json")
    assert machine.code == 2
    assert json.loads(machine.out) == {"error": {"type": kind.__name__, "message": "this is wrong. Do that."}}
    assert machine.err == plain.err


def test_an_export_that_fails_in_its_engine_exits_with_1(capsys: pytest.CaptureFixture[str], broken: Any) -> None:
    """Scripts can tell a model that must not be used from something to mend."""
    broken(errors.VerificationError("llama.cpp answers otherwise."))
    answer = call(capsys, "methods", "--json")
    assert answer.code == 1 and answer.json()["error"]["type"] == "VerificationError"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str], broken: Any, error: BaseException) -> None:
    """As shells expect, and it says that nothing is lost."""
    broken(error)
    answer = call(capsys, "methods")
    assert answer.code == 130
    assert "stopped; the same command continues where this one was." in answer.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_says_what_to_lower(
    capsys: pytest.CaptureFixture[str], broken: Any, error: BaseException
) -> None:
    """On a CPU and on a GPU alike."""
    broken(error)
    answer = call(capsys, "methods", "--json")
    assert answer.code == 2
    assert "out of memory. Lower calibrate.batch_size" in answer.err
    assert answer.json()["error"]["type"] == "MemoryError"


@pytest.mark.parametrize("error", [RuntimeError("ours"), AssertionError("ours"), KeyError("ours")])
def test_our_own_bugs_are_not_hidden(broken: Any, error: BaseException) -> None:
    """What a user cannot mend keeps its traceback."""
    broken(error)
    with pytest.raises(type(error)) as caught:
        entry.main(["methods"])
    assert caught.value is error


def test_the_group_knows_its_commands_by_name() -> None:
    """It lists them in the order of the work, and finds each."""
    context = click.Context(cli)
    assert cli.list_commands(context) == list(COMMANDS)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None and command.name == name
