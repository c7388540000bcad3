"""Write the pages that can rot: methods, families and commands, from the code itself.

``python docs/generate.py`` writes them; with ``--check`` it fails if one is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from secateur.cli.main import COMMANDS, cli
from secateur.families.geometry import family_axis
from secateur.families.loader import families
from secateur.records.units import LAYER_UNIT_KINDS
from secateur.score import METHODS

FOLDER = Path(__file__).parent


def methods_page() -> str:
    """Return one section per scoring method."""
    lines = [
        "# Scoring methods",
        "",
        "Generated from the code. A method gives every unit one importance; higher = keep. Recipes name it in",
        "`prune.method`, for whole layers and sub-layers in `prune.depth_method`. `random` and `reversed` are",
        "controls: a method is worth something only where it beats them at the same size.",
        "[How contextual pruning is defined and was checked](contextual-pruning.md).",
    ]
    for name, method in METHODS.items():
        lines += [
            "",
            f"## `{name}`" + (" (control)" if method.control else ""),
            "",
            f"- measures: {method.measures}",
            f"- scores: {', '.join(f'`{kind}`' for kind in method.kinds)}",
            f"- formula: `{method.formula}`",
            f"- needs: {method.needs}; cost: {method.cost}",
            f"- when it is a bad idea: {method.caveat}",
            f"- source: {method.source}",
        ]
    return "\n".join(lines) + "\n"


def families_page() -> str:
    """Return which model types are supported and what can be cut in each."""
    lines = [
        "# Model families",
        "",
        "Generated from the family files in `src/secateur/families/data`. A new family is one TOML file; it joins the",
        "contract tests by existing.",
        "",
        "Token ids (`vocabulary`) can be cut in every family; whether they can depends on the",
        "[tokenizer](tokenizer.md).",
        "",
        "Whole layers (`layer`) and sub-layers (`attention`, `ffn`) can be taken out of every family, except as said",
        "below; see [What can be removed?](units.md).",
        "",
        "`ffn_channel` is about FFNs without experts; `expert` and the two columns after it are about",
        "[mixture-of-experts layers](units.md#what-are-experts).",
        "",
        "| family | `model_type` | " + " | ".join(f"`{kind}`" for kind in LAYER_UNIT_KINDS) + " |",
        "|---|---|" + "---|" * len(LAYER_UNIT_KINDS),
    ]
    for name, family in families().items():
        cells = []
        for kind in LAYER_UNIT_KINDS:
            if all(axis.name != kind for axis in family.axes):
                cells.append("")
                continue
            axis = family_axis(family, kind)
            where = "" if axis.divisor and axis.divisor.always else "uniform shape: "
            rule = f"; {where}{axis.divisor.number} must divide {axis.divisor.of}" if axis.divisor else ""
            cells.append(f"no: {axis.fixed}" if axis.fixed else f"yes{rule}")
        lines.append(f"| {name} | {', '.join(f'`{t}`' for t in family.model_types)} | {' | '.join(cells)} |")
    lines += [""]
    for name, family in families().items():
        for fixed in family.blocks.fixed:
            units = ", ".join(f"`{unit}`" for unit in fixed.units)
            lines.append(f"- {name}: not {units}: {fixed.reason}")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Return the help text of every command."""
    lines = ["# Commands", "", "Generated from `secateur --help`.", "", "```", _help([]), "```"]
    for name in COMMANDS:
        lines += ["", f"## `secateur {name}`", "", "```", _help([name]), "```"]
        group = cli.get_command(click.Context(cli), name)
        for inner in group.list_commands(click.Context(group)) if isinstance(group, click.Group) else ():
            lines += ["", f"### `secateur {name} {inner}`", "", "```", _help([name, inner]), "```"]
    return "\n".join(lines) + "\n"


def _help(path: list[str]) -> str:
    command: click.Command = cli
    context = click.Context(cli, info_name="secateur", terminal_width=100, max_content_width=100)
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command = found
        context = click.Context(command, info_name=name, parent=context, terminal_width=100, max_content_width=100)
    return command.get_help(context).rstrip()


PAGES = {"methods.md": methods_page, "families.md": families_page, "cli.md": commands_page}


def main() -> int:
    """Write the pages, or with ``--check`` compare them; return the exit code."""
    stale = []
    for name, render in PAGES.items():
        file, text = FOLDER / name, render()
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"stale: {', '.join(stale)}; run `make docs`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
