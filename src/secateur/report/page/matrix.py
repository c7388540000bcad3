"""The page of a domain matrix: a map of rows by texts, each domain's own model against the others, and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.records.comparison import judge
from secateur.records.matrix import CONTROL, GENERAL, OTHERS, DomainMatrix, SizeMatrix
from secateur.report.comparison import shown_interval, words
from secateur.report.matrix import matrix_notes, matrix_table, matrix_verdict, own_best, own_table, texts_table
from secateur.report.page.chart import ROW_HEIGHT, Chart, dashed_line, make_chart, ratio_scale
from secateur.report.page.compare import judgement_color, ratio_chart
from secateur.report.page.document import Document, Section, Tile
from secateur.report.page.records import TIMES, ratio_of
from secateur.report.page.theme import CATEGORIES, color
from secateur.report.tables import Table

_MOST_COLUMNS = 8
"""With more texts than that, cells are too narrow for their numbers on a phone; the table has them."""

_DARK = "#131715"
"""Letters on cells of middling strength, which are light enough for it on light and on dark pages."""

_LONG_NAME = 9
"""Letters from which a text's name is written aslant."""

_TILES = {
    GENERAL: "own text instead of general",
    OTHERS: "own text instead of another domain's",
    CONTROL: "own text instead of a random cut",
}


def matrix_document(matrix: DomainMatrix) -> Document:
    """Return what the page of a domain matrix says."""
    sections = [_size_section(matrix, size, number) for number, size in enumerate(matrix.sizes)]
    if (by_size := _sizes_section(matrix)) is not None:
        sections.append(by_size)
    sections.append(
        Section(
            "evidence",
            "On what text was it measured?",
            ["All rows read the same test text; no document of it was calibrated on."],
            tables=[texts_table(matrix)],
        )
    )
    budgets = ",".join(f"{value:g}" for size in matrix.sizes for value in size.budget.values())
    asked = f" --budgets {budgets}" if len(matrix.sizes) > 1 else ""
    return Document(
        kind="Domain matrix",
        title=f"{short_model(matrix.model)}, ",
        subject=f"calibrated on {', '.join(matrix.domains)}",
        verdict=matrix_verdict(matrix),
        sections=sections,
        tiles=_tiles(matrix),
        cautions=matrix_notes(matrix),
        made=[facts_table(matrix)],
        recipe_yaml=matrix.recipe_yaml,
        commands=[f"secateur matrix recipe.yml{asked} --output again", "secateur report MATRIX_FOLDER"],
        version=matrix.versions.get("secateur", ""),
    )


def short_model(model: str) -> str:
    """Return a model's name without the folders of the machine it lay on."""
    name = model.replace("\\", "/").rstrip("/")
    return name.rpartition("/")[2] if name.startswith(("/", ".", "~")) or name[1:3] == ":/" else name


def facts_table(matrix: DomainMatrix) -> Table:
    """Return what a matrix was made from."""
    facts = [
        ["dense model", matrix.model],
        ["its fingerprint", matrix.model_fingerprint],
        ["scoring method", matrix.method],
        ["seed of cuts and control", str(matrix.seed)],
        *([name, version] for name, version in matrix.versions.items()),
    ]
    return Table("what it was made from", ["fact", "value"], facts)


def _tiles(matrix: DomainMatrix) -> list[Tile]:
    if not matrix.sizes:
        return []
    size = matrix.sizes[-1]
    own = size.own_domains(matrix.domains)
    best, sure = own_best(size, own)
    at = f" ({size.label})" if len(matrix.sizes) > 1 else ""
    detail = f"surer than chance against every other text in {sure}"
    found = [Tile(f"own model is best on its text{at}", f"{best} of {len(own)}", detail)]
    for other, label in _TILES.items():
        mean = size.mean_against(other)
        if mean is None:
            if other == GENERAL:
                found.append(Tile(label, "not measured", "the recipe has no general text", is_missing=True))
            continue
        ratio = ratio_of(mean)
        detail = f"perplexity on average; 95 % interval {ratio.interval() or 'unknown'}: {words(judge(mean))}"
        found.append(Tile(f"{label}{at}", f"{ratio.short()} {TIMES}", detail))
    return found


def _size_section(matrix: DomainMatrix, size: SizeMatrix, number: int) -> Section:
    own = size.own_domains(matrix.domains)
    charts = [matrix_chart(matrix, size)]
    charts += [own_chart(size, domain) for domain in own if _against(size, domain)]
    tables = [matrix_table(matrix, size), own_table(size)]
    title = "Does the calibration text matter?" if len(matrix.sizes) == 1 else f"With {size.label}"
    return Section(
        f"size-{number}",
        title,
        [
            "Each row is a model by the text it was calibrated on, each column the text it was measured on. Numbers "
            "are perplexities over the dense model's on the same documents: lower is better. A frame marks a domain's "
            f"own model. The row {CONTROL} keeps as many units, drawn by chance.",
            "The charts below it compare a domain's own model with the others on its text, document by document: left "
            "of the dashed line the own model is better.",
        ],
        charts,
        [table for table in tables if table.rows],
    )


def matrix_chart(matrix: DomainMatrix, size: SizeMatrix) -> Chart:
    """Return a map of rows by texts; the stronger a cell, the more loss. The control does not stretch the scale."""
    rows: list[dict[str, Any]] = []
    for row in size.rows:
        for text in matrix.texts:
            ratio = ratio_of(row.to_dense[text])
            rows.append(
                {
                    "model": row.name,
                    "text": text,
                    "log": row.to_dense[text].mean,
                    "shown": _short_number(ratio.value),
                    "full": f"{ratio.short()} {TIMES}",
                    "interval": ratio.interval() or "unknown",
                    "own": row.kind == "domain" and row.name == text,
                }
            )
    judged = [one["log"] for one, row in _with_rows(rows, size, len(matrix.texts)) if row.kind != "control"]
    low, high = min(judged), max(max(judged), min(judged) + 1e-6)
    names = list(matrix.texts)
    aslant = max(map(len, names)) > _LONG_NAME
    text_axis = {"orient": "top", "labelAngle": -30 if aslant else 0, "labelLimit": 90, "labelColor": color("ink")}
    place = {
        "x": {
            "field": "text",
            "type": "nominal",
            "sort": None,
            "title": "measured on",
            "axis": text_axis,
            "scale": {"paddingInner": 0.06, "paddingOuter": 0.03},
        },
        "y": {
            "field": "model",
            "type": "nominal",
            "sort": None,
            "title": None,
            "axis": {"labelColor": color("ink"), "labelLimit": 110},
            "scale": {"paddingInner": 0.1, "paddingOuter": 0.05},
        },
    }
    tip = [
        {"field": "model", "title": "calibrated on"},
        {"field": "text", "title": "measured on"},
        {"field": "full", "title": "perplexity ÷ dense"},
        {"field": "interval", "title": "95 % interval"},
    ]
    shade = {
        "field": "log",
        "type": "quantitative",
        "scale": {"domain": [low, high], "range": [color("ramp_low"), color("ramp_high")], "clamp": True},
        "legend": None,
    }
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rect"}, "encoding": {**place, "color": shade, "tooltip": tip}},
        {
            "transform": [{"filter": "datum.own"}],
            "mark": {"type": "rect", "filled": False, "strokeWidth": 3, "stroke": color("orange")},
            "encoding": {**place, "tooltip": tip},
        },
    ]
    if len(names) <= _MOST_COLUMNS:
        bright, strong = (low + share * (high - low) for share in (0.4, 0.65))
        ink = {
            "condition": [
                {"test": f"datum.log > {strong!r}", "value": color("page")},
                {"test": f"datum.log > {bright!r}", "value": _DARK},
            ],
            "value": color("ink"),
        }
        layers.append(
            {
                "mark": {"type": "text", "fontSize": 12},
                "encoding": {**place, "text": {"field": "shown"}, "color": ink, "tooltip": tip},
            }
        )
    told = "; ".join(
        f"calibrated on {row.name}: " + ", ".join(f"{ratio_of(row.to_dense[name]).short()} on {name}" for name in names)
        for row in size.rows
    )
    return make_chart(
        f"matrix-{size.label}",
        f"Perplexity relative to the dense model, {size.label}",
        f"Map of models by the text they were calibrated on and of texts they were measured on; numbers are "
        f"perplexities over the dense model's, lower is better. {told[:1].upper()}{told[1:]}.",
        rows,
        height=ROW_HEIGHT * len(size.rows),
        is_wide=True,
        layer=layers,
        resolve={"scale": {"color": "independent"}},
    )


def _with_rows(rows: Sequence[dict[str, Any]], size: SizeMatrix, columns: int) -> list[tuple[dict[str, Any], Any]]:
    return [(one, size.rows[place // columns]) for place, one in enumerate(rows)]


def _short_number(value: float) -> str:
    """Return a ratio in at most five characters, so that it fits a cell on a phone."""
    if value < 10:
        return f"{value:.3f}" if value < 2 else f"{value:.2f}"
    return f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def _against(size: SizeMatrix, domain: str) -> list[Any]:
    """Return a domain's differences from rows that were calibrated on other text."""
    return [one for one in size.differences if one.domain == domain and one.other not in (CONTROL, OTHERS)]


def own_chart(size: SizeMatrix, domain: str) -> Chart:
    """Return the perplexity of a domain's own model over that of models calibrated on other text."""
    found = _against(size, domain)
    ratios = {one.other: ratio_of(one.nll) for one in found}
    judged = {one.other: one.judgement for one in found}
    told = "; ".join(f"{name} {shown_interval(one)}, {words(judged[name])}" for name, one in ratios.items())
    return ratio_chart(
        f"own-{domain}-{size.label}",
        f"On {domain} text: its own model, relative to those of other text",
        f"Perplexity on {domain} of the model calibrated on {domain} over that of the model calibrated on other text; "
        f"below 1 the own one is better: {told}.",
        ratios,
        "own ÷ other's perplexity (left: own better)",
        judgement_color(),
        judged,
    )


def _sizes_section(matrix: DomainMatrix) -> Section | None:
    charts = []
    for other, title in ((GENERAL, "general text"), (OTHERS, "another domain")):
        if (chart := sizes_chart(matrix, other, title)) is not None:
            charts.append(chart)
    if not charts:
        return None
    return Section(
        "sizes",
        "At which size does it matter?",
        [
            "Perplexity of each domain's own model over that of the other model on its text, at every size, with 95 % "
            "intervals; below the dashed line the own one is better."
        ],
        charts,
        [_sizes_table(matrix)],
    )


def _size_points(matrix: DomainMatrix, other: str) -> list[dict[str, Any]]:
    """Return a row per size and domain; domains stand side by side, so that their intervals are not over each other."""
    shares = [next(iter(size.budget.values()), 0.0) for size in matrix.sizes]
    shift, rows = 0.012 * (max(shares) - min(shares)), []
    for size in matrix.sizes:
        for one in size.against(other):
            ratio = ratio_of(one.nll)
            rows.append(
                {
                    "domain": one.domain,
                    "share": next(iter(size.budget.values())),
                    "place": next(iter(size.budget.values())) + shift * matrix.domains.index(one.domain),
                    "ratio": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                    "shown": f"{ratio.short()} {TIMES}",
                    "interval": ratio.interval() or "unknown",
                    "judgement": one.judgement,
                }
            )
    return rows


def _sizes_table(matrix: DomainMatrix) -> Table:
    rows = []
    for other in (GENERAL, OTHERS):
        for one in _size_points(matrix, other):
            cells = [one["domain"], other, f"{one['share']:g}", one["shown"], one["interval"], words(one["judgement"])]
            rows.append(cells)
    columns = ["text", "instead", "removed", "perplexity own / other", "95 % interval", "the own model is"]
    return Table("own against other by size", columns, rows)


def sizes_chart(matrix: DomainMatrix, other: str, title: str) -> Chart | None:
    """Return own over other by size, a line per domain; None where there is one size alone."""
    rows = _size_points(matrix, other) if all(size.budget for size in matrix.sizes) else []
    if len({row["share"] for row in rows}) < 2:
        return None
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    scale = ratio_scale([ratio_of(one.nll) for size in matrix.sizes for one in size.against(other)])
    series = {
        "field": "domain",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": domains, "range": [color(CATEGORIES[i % len(CATEGORIES)]) for i in range(len(domains))]},
        "legend": {"title": None, "symbolType": "circle", "columns": 3},
    }
    x = {
        "field": "place",
        "type": "quantitative",
        "title": f"{next(iter(matrix.sizes[0].budget))} removed",
        "axis": {"format": ".0%", "values": sorted({row["share"] for row in rows}), "grid": False},
        "scale": {"zero": False, "padding": 14},
    }
    y = {
        "field": "ratio",
        "type": "quantitative",
        "title": None,
        "scale": scale,
        "axis": {"format": "~g", "tickCount": 5},
    }
    tip = [
        {"field": "domain"},
        {"field": "share", "title": "removed", "format": ".0%"},
        {"field": "shown", "title": "own ÷ other"},
        {"field": "interval", "title": "95 % interval"},
        {"field": "judgement", "title": "verdict"},
    ]
    ends = "; ".join(
        f"{name} from {mine[0]['shown']} to {mine[-1]['shown']}"
        for name in domains
        if (mine := [row for row in rows if row["domain"] == name])
    )
    across = {"y": {"datum": 1.0, "type": "quantitative"}}
    return make_chart(
        f"sizes-{title}",
        f"Own text instead of {title}",
        f"Perplexity of each domain's own model over that calibrated on {title}, by size: {ends}.",
        rows,
        height=5 * ROW_HEIGHT,
        layer=[
            {**dashed_line(1.0), "encoding": across},
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.6},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": series},
            },
            {"mark": {"type": "line"}, "encoding": {"x": x, "y": y, "color": series}},
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": series, "tooltip": tip},
            },
        ],
    )
