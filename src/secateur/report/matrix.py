"""A domain matrix in words and tables, for the terminal; its page is made of the same."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.records.comparison import judge
from secateur.records.evaluation import PairedDifference
from secateur.records.matrix import CONTROL, GENERAL, OTHERS, DomainMatrix, MatrixRow, SizeMatrix
from secateur.report.comparison import few_documents, words
from secateur.report.page.cautions import FEW_DOCUMENTS
from secateur.report.page.records import TIMES, ratio_of
from secateur.report.tables import Table, format_count, with_error

_INSTEAD = {GENERAL: "on general text", OTHERS: "on another domain", CONTROL: "and not at random"}
"""What a model would have been calibrated on otherwise."""


def matrix_verdict(matrix: DomainMatrix) -> str:
    """Return what came out: a few sentences on one size, or one on each of several."""
    if len(matrix.sizes) == 1:
        return size_verdict(matrix, matrix.sizes[0])
    return " ".join(_short_verdict(matrix, size) for size in matrix.sizes)


def size_verdict(matrix: DomainMatrix, size: SizeMatrix) -> str:
    """Return in how many domains the own model is best, and how much that is on average."""
    told = f"{_best_in_words(matrix, size)}."
    for other, instead in _INSTEAD.items():
        if (mean := size.mean_against(other)) is not None:
            calibrated = "Chosen by its own text" if other == CONTROL else "Calibrated on its own text and not"
            told += f" {calibrated} {instead}, a model's perplexity there is {_in_words(mean)}."
    return told


def _short_verdict(matrix: DomainMatrix, size: SizeMatrix) -> str:
    other = GENERAL if size.against(GENERAL) else OTHERS
    mean, told = size.mean_against(other), _best_in_words(matrix, size)
    beside = "the model of general text" if other == GENERAL else "those of the other domains"
    return f"{told}; beside {beside} its perplexity is {_in_words(mean)}." if mean else f"{told}."


def _best_in_words(matrix: DomainMatrix, size: SizeMatrix) -> str:
    own = size.own_domains(matrix.domains)
    best, sure = own_best(size, own)
    told = f"With {size.label}, each domain's own model is best on its text in {best} of {len(own)} domains"
    return told + (f", in {sure or 'none'} surer than chance" if best else "")


def _in_words(mean: PairedDifference) -> str:
    ratio = ratio_of(mean)
    told = f"{with_error(ratio.value, ratio.stderr)} {TIMES} on average: {words(judge(mean))}"
    return told + (f" (95 % interval {ratio.interval()})" if ratio.interval() else "")


def own_best(size: SizeMatrix, own: Sequence[str]) -> tuple[int, int]:
    """Return in how many domains the own model has the lowest loss, and in how many that is surer than chance."""
    best = [name for name in own if size.best(name) == name]
    sure = [
        name
        for name in best
        if all(
            one.judgement == "better"
            for one in size.differences
            if one.domain == name and one.other not in (OTHERS, CONTROL)
        )
    ]
    return len(best), len(sure)


def matrix_notes(matrix: DomainMatrix) -> list[str]:
    """Return what a careful reader holds against the numbers."""
    notes = [f"{name} is missing: {message}" for name, message in matrix.failures.items()]
    notes += matrix.notes
    if few := [
        f"{name} ({one.num_documents})" for name, one in matrix.texts.items() if one.num_documents < FEW_DOCUMENTS
    ]:
        notes.append(few_documents(few))
    for size in matrix.sizes:
        counts = [row.parameters for row in size.rows if row.kind != "control"]
        if max(counts) / min(counts) > 1.001:
            notes.append(
                f"With {size.label} the rows keep from {format_count(min(counts))} to {format_count(max(counts))} "
                "parameters: a larger model should lose less, whatever it was calibrated on."
            )
    if GENERAL not in matrix.texts:
        notes.append("There is no general text, so no row says what calibration on any text would have given.")
    notes.append(
        "Every cut was made once. Intervals say how the numbers would move with other test documents, not with other "
        "calibration text: repeat a close result with another corpus or more of it."
    )
    return notes


def matrix_tables(matrix: DomainMatrix) -> list[Table]:
    """Return every table, size by size, and the test text."""
    tables = [table for size in matrix.sizes for table in (matrix_table(matrix, size), own_table(size)) if table.rows]
    return [*tables, texts_table(matrix)]


def matrix_table(matrix: DomainMatrix, size: SizeMatrix) -> Table:
    """Return every row's perplexity over the dense model's on every text; the first row is the dense model itself."""
    dense = ["dense", format_count(matrix.parameters_dense)]
    dense += [
        f"perplexity {with_error(one.perplexity, one.perplexity * one.nll_stderr)}" for one in matrix.texts.values()
    ]
    rows = [dense, *(_row(matrix, row) for row in size.rows)]
    columns = ["calibrated on", "parameters", *(f"on {name}" for name in matrix.texts)]
    return Table(f"perplexity / dense, {size.label} (± one standard error)", columns, rows)


def _row(matrix: DomainMatrix, row: MatrixRow) -> list[str]:
    share = row.parameters / matrix.parameters_dense - 1
    cells = []
    for name in matrix.texts:
        ratio = ratio_of(row.to_dense[name])
        cells.append(with_error(ratio.value, ratio.stderr))
    return [row.name, f"{format_count(row.parameters)} ({share:+.1%})", *cells]


def own_table(size: SizeMatrix) -> Table:
    """Return how each domain's own model differs from every other row on its text, paired by document."""
    rows = []
    for one in size.differences:
        ratio = ratio_of(one.nll)
        cells = [with_error(ratio.value, ratio.stderr), ratio.interval() or "unknown", words(one.judgement)]
        rows.append([one.domain, one.other, *cells])
    columns = ["text", "calibrated on, instead", "perplexity own / other", "95 % interval", "the own model is"]
    return Table(f"own against other, {size.label} (± one standard error)", columns, rows)


def texts_table(matrix: DomainMatrix) -> Table:
    """Return on which text all rows were measured."""
    rows = [
        [name, f"{one.num_documents:,}", f"{one.num_tokens:,}", f"{one.bits_per_byte:.4f}", one.corpus_fingerprint[:16]]
        for name, one in matrix.texts.items()
    ]
    return Table("test text", ["text", "documents", "dense tokens", "dense bits/byte", "fingerprint"], rows)
