"""``secateur vocabulary``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from secateur.recipe import Recipe, VocabularySpec

_RULES = ("min_count", "threshold", "coverage", "size")
_LISTS = ("keep", "keep_file", "keep_characters")
_POSITIVE = click.IntRange(min=1)


@click.command("vocabulary")
@click.argument("model")
@click.argument("corpus")
@click.option("--text", metavar="TEMPLATE", help="How a record of CORPUS becomes text, such as '{question} {answer}'.")
@click.option("--compare", metavar="CORPUS2", help="Another corpus; shows how the two differ.")
@click.option("--compare-text", metavar="TEMPLATE", help="How a record of CORPUS2 becomes text.")
@click.option("--min-count", type=_POSITIVE, metavar="N", multiple=True, help="Rule: keep ids used N times or more.")
@click.option("--threshold", metavar="R", multiple=True, help="Rule: keep ids with more than this share of all tokens.")
@click.option("--coverage", type=float, metavar="R", multiple=True, help="Rule: keep the most used ids, to this share.")
@click.option("--size", type=_POSITIVE, metavar="N", multiple=True, help="Rule: keep this many ids in all.")
@click.option("--keep", metavar="TERM", multiple=True, help="Keep what writes a word or phrase.")
@click.option("--keep-file", metavar="FILE", multiple=True, help="Keep what writes the lines of a file.")
@click.option("--keep-characters", metavar="RANGE", multiple=True, help="Keep a script, such as U+0370-U+03FF.")
@click.option(
    "--characters",
    type=click.Choice(["all", "used"]),
    default="all",
    show_default=True,
    help="Whether single characters that bytes can spell stay too where no rule keeps them.",
)
@click.option("--max-tokens", type=_POSITIVE, metavar="N", help="Read this much of each split, in its order.")
@click.option("--trust-remote-code", is_flag=True, help="Let a model bring its own Python code.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(
    model: str,
    corpus: str,
    text: str | None,
    compare: str | None,
    compare_text: str | None,
    max_tokens: int | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Show which token ids of MODEL the text of CORPUS uses, and what cutting the others would save and cost.

    CORPUS is a file, a folder or a glob. Rules count its calibration split; costs are measured on its test split. Each
    rule option may be given several times; without any, some common rules are tried. Weights are not loaded.
    """
    from secateur.cli.console import print_json, print_table, progress_for, quiet_libraries
    from secateur.recipe import parse_recipe
    from secateur.report.vocabulary import frequency_table, rules_table, survey_notes, texts_table

    if compare_text is not None and compare is None:
        raise click.UsageError("--compare-text needs --compare.", click.get_current_context())
    source = {"path": corpus, "text": text}
    other = None if compare is None else {"path": compare, "text": compare_text}
    stays: dict[str, Any] = {key: list(asked[key]) for key in _LISTS if asked[key]}
    stays |= {"characters": asked["characters"], "max_tokens": max_tokens}

    def read(rule: Mapping[str, Any]) -> tuple[Recipe, VocabularySpec]:
        """Return the recipe that the options stand for, with one rule: what it refuses, this command refuses."""
        data = {"model": model, "domain": {"text": source}, "general": other}
        recipe = parse_recipe({**data, "prune": {"vocabulary": {**stays, **rule}}}, source="what was asked for")
        assert recipe.prune.vocabulary is not None
        return recipe, recipe.prune.vocabulary

    recipe, spec = read({})
    rules = [read({key: value})[1].rule() for key in _RULES for value in asked[key]]
    quiet_libraries()
    from secateur.store.checkpoints import load_tokenizer, resolve_model
    from secateur.survey import DEFAULT_RULES, survey_vocabulary

    checkpoint = resolve_model(model, trust_remote_code=trust_remote_code)
    with progress_for(as_json, quiet) as progress:
        survey = survey_vocabulary(
            checkpoint,
            load_tokenizer(checkpoint, trust_remote_code=trust_remote_code),
            recipe.domain["text"],
            spec=spec,
            rules=rules or DEFAULT_RULES,
            compare=recipe.general,
            progress=progress,
        )
    if as_json:
        print_json(survey.to_dict())
        return
    for table in (texts_table(survey), frequency_table(survey), rules_table(survey)):
        print_table(table)
    for note in survey_notes(survey):
        click.echo(note)
    found = next((rule.rule for rule in survey.rules if not rule.problem), None)
    if found is not None:
        click.echo(f"\nnext: put one rule into a recipe, for example\n\n{_recipe_lines({**stays, **found})}")


def _recipe_lines(vocabulary: Mapping[str, Any]) -> str:
    import yaml

    said = {key: value for key, value in vocabulary.items() if value not in (None, "all")}
    return yaml.safe_dump({"prune": {"vocabulary": said}}, sort_keys=False, allow_unicode=True).rstrip()
