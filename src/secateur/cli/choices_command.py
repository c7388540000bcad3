"""``secateur choices make``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from secateur.corpus.choice_sources import Part
    from secateur.corpus.make_choices import Distractors, MadeChoices


@click.group("choices")
def command() -> None:
    """Make sets of multiple-choice questions from your own text.

    Commands take --json.
    """


@command.command("make")
@click.argument("corpus")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Write them here (.jsonl).")
@click.option("--term", metavar="FIELD", help="Field (or template) with a term; asks for its definition.")
@click.option("--definition", metavar="FIELD", help="Field (or template) with the definition of the term.")
@click.option("--question", metavar="TEMPLATE", help="What is asked about a term, such as 'What is {term}?'.")
@click.option("--subject", metavar="FIELD", help="Field (or template) that each question takes along as its subject.")
@click.option("--text", metavar="TEMPLATE", help="How a record becomes a document: as in your recipe's corpus.")
@click.option("--num", type=click.IntRange(min=1), default=500, show_default=True, help="Most questions.")
@click.option("--choices", "num_choices", type=click.IntRange(2, 26), default=4, show_default=True, help="Of each.")
@click.option(
    "--distractors",
    type=click.Choice(["random", "near"]),
    default="random",
    show_default=True,
    help="Wrong choices of similar length, by chance; or those with the most words of the right one, which is harder.",
)
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "calibration", "all"]),
    default="test",
    show_default=True,
    help="Documents of this split only; the test split is never calibrated or trained on.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn by chance.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def make(
    corpus: str,
    out: Path,
    term: str | None,
    definition: str | None,
    question: str | None,
    subject: str | None,
    text: str | None,
    num: int,
    num_choices: int,
    distractors: Distractors,
    split: Part,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Make multiple-choice questions from the text of CORPUS, a file, a folder or a glob.

    With --term and --definition a question asks which definition belongs to a term. Without them, a question is a
    passage, and the choices are its next sentence and sentences of other documents. No model is used.
    """
    if (term is None) != (definition is None):
        raise click.UsageError("--term and --definition go together.", click.get_current_context())
    if question is not None and term is None:
        raise click.UsageError("--question is about a term; give --term and --definition.", click.get_current_context())
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists. Give another name, or --force.", click.get_current_context())
    from secateur.cli.console import print_json, print_table, quiet_libraries

    quiet_libraries()
    from secateur.corpus.choice_sources import QUESTION, read_terms, read_texts
    from secateur.corpus.make_choices import MakeOptions, continuation_questions, definition_questions
    from secateur.errors import CorpusError
    from secateur.files import replacing
    from secateur.recipe import CorpusSpec
    from secateur.report.tables import Table

    options = MakeOptions(num=num, num_choices=num_choices, distractors=distractors, seed=seed)
    spec, asked = CorpusSpec(path=corpus, text=text), question or QUESTION
    try:
        if term is None or definition is None:
            made = continuation_questions(read_texts(spec, split, subject=subject), options)
        else:
            terms = read_terms(spec, term, definition, split, question=asked, subject=subject)
            made = definition_questions(terms, options)
    except CorpusError as error:
        if text is None and "Set text:" in str(error):
            raise CorpusError(
                f"{error} Here that is --text TEMPLATE: the one of your recipe, because a document's text decides "
                f"whether it is test text. With --split all none is needed."
            ) from None
        raise
    with replacing(out) as file:
        for one in made.questions:
            file.write((json.dumps(one.to_dict(), ensure_ascii=False) + "\n").encode())
    if as_json:
        print_json(_summary(made, out))
        return
    rows = [[name, f"{100 * share:.1f}"] for name, share in made.baselines().items()]
    print_table(Table("right answers without knowledge (%)", ["picked by", "expected"], rows))
    for reason, count in made.left_out.items():
        click.echo(f"left out: {count:,} ({reason})")
    fewer = f" ({num:,} were asked for)" if len(made.questions) < num else ""
    click.echo(f"{len(made.questions):,} questions of {made.num_candidates:,} possible ones{fewer}: {out}")
    click.echo(f"\nnext: put them into a recipe\n\n{_recipe_lines(out, term is None, subject is not None)}")


def _summary(made: MadeChoices, out: Path) -> dict[str, object]:
    return {
        "file": str(out),
        "questions": len(made.questions),
        "candidates": made.num_candidates,
        "left_out": dict(made.left_out),
        "baselines": made.baselines(),
    }


def _recipe_lines(out: Path, is_continuation: bool, has_subject: bool) -> str:
    import yaml

    spec = {"path": str(out), **({"prompt": "{question}"} if is_continuation else {})}
    spec |= {"subject": "subject"} if has_subject else {}
    return yaml.safe_dump({"evaluate": {"choices": {"made": spec}}}, sort_keys=False, allow_unicode=True).rstrip()
