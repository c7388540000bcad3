"""The page of a family of experts: how each does on its own text, on the others' and on general text."""

from __future__ import annotations

from secateur.records.experts import ExpertFamily
from secateur.report.comparison import shown_interval
from secateur.report.experts import experts_notes, experts_table, experts_verdict, places_table
from secateur.report.matrix import matrix_table, own_table, texts_table
from secateur.report.page.chart import Chart, equals
from secateur.report.page.compare import ratio_chart
from secateur.report.page.document import Document, Section, Tile
from secateur.report.page.matrix import facts_table, matrix_chart, own_chart, short_model
from secateur.report.page.records import TIMES, ratio_of
from secateur.report.page.theme import color
from secateur.report.tables import format_bytes

_MOST_TILES = 5


def experts_document(family: ExpertFamily) -> Document:
    """Return what the page of a family of experts says."""
    matrix = family.matrix
    return Document(
        kind="Family of experts",
        title=f"{short_model(matrix.model)}, ",
        subject=f"an expert each for {', '.join(one.name for one in family.experts)}",
        verdict=experts_verdict(family),
        sections=[
            _experts(family),
            *([_against(family)] if family.size.differences else []),
            Section("places", "Where are they?", [_PLACES], tables=[places_table(family)]),
            Section("evidence", "On what text was it measured?", [_EVIDENCE], tables=[texts_table(matrix)]),
        ],
        tiles=_tiles(family),
        cautions=experts_notes(family),
        made=[facts_table(matrix)],
        recipe_yaml=matrix.recipe_yaml,
        commands=["secateur experts recipe.yml --output again", "secateur report EXPERTS_FOLDER"],
        version=matrix.versions.get("secateur", ""),
    )


_PLACES = (
    "Every expert is a whole run: its folder has a page of its own, the plan, and all measurements. The paths below "
    "are in the folder of the family."
)
_EVIDENCE = "All experts read the same test text; no document of it was calibrated or trained on."


def _tiles(family: ExpertFamily) -> list[Tile]:
    weights = sum(one.size_bytes for one in family.experts)
    found = [Tile("experts", str(len(family.experts)), f"weights of {format_bytes(weights)} together")]
    for one in family.experts[:_MOST_TILES]:
        ratio = ratio_of(family.own(one))
        detail = f"perplexity relative to the dense model; 95 % interval {ratio.interval() or 'unknown'}"
        found.append(Tile(f"{one.name} on its own text", f"{ratio.short()} {TIMES}", detail))
    return found


def _experts(family: ExpertFamily) -> Section:
    charts = [matrix_chart(family.matrix, family.size)] if len(family.experts) > 1 else []
    return Section(
        "experts",
        "Which expert for which text?",
        [
            "Each expert was cut (and trained, where the recipe says so) on its own domain's text. Numbers are "
            "perplexities over the dense model's on the same documents: lower is better. A frame marks an expert on "
            "its own text.",
            "The charts below it show all experts on one text, the own one in colour.",
        ],
        [*charts, *(loss_chart(family, text) for text in family.matrix.texts)],
        [experts_table(family), matrix_table(family.matrix, family.size)],
    )


def _against(family: ExpertFamily) -> Section:
    own = [one.name for one in family.experts]
    return Section(
        "against",
        "Is the own expert the right one?",
        [
            "Each domain's own expert beside the others on its text, document by document: left of the dashed line the "
            "own one is better. Where it is not, one expert would do for both domains."
        ],
        [own_chart(family.size, name) for name in own if any(one.domain == name for one in family.size.differences)],
        [own_table(family.size)],
    )


def loss_chart(family: ExpertFamily, text: str) -> Chart:
    """Return the perplexity of every expert on one text, relative to the dense model."""
    ratios = {row.name: ratio_of(row.to_dense[text]) for row in family.size.rows}
    told = "; ".join(f"{name} {shown_interval(one)}" for name, one in ratios.items())
    highlight = {"condition": [{"test": equals("model", text), "value": color("accent")}], "value": color("other")}
    return ratio_chart(
        f"experts-{text}",
        f"On {text} text, relative to the dense model",
        f"Perplexity on {text} of every expert over the dense model's: {told}.",
        ratios,
        "perplexity ÷ dense (left: better)",
        highlight,
    )
