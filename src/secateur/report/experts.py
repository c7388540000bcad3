"""A family of experts in words and tables, for the terminal; its page is made of the same."""

from __future__ import annotations

from pathlib import Path

from secateur.records.evaluation import PairedDifference
from secateur.records.experts import Expert, ExpertFamily
from secateur.records.matrix import GENERAL, OTHERS
from secateur.report.comparison import few_documents
from secateur.report.matrix import matrix_table, own_best, own_table, texts_table
from secateur.report.page.cautions import FEW_DOCUMENTS
from secateur.report.page.records import TIMES, ratio_of
from secateur.report.tables import Table, format_bytes, format_count, with_error

NOT_MEASURED = "-"


def experts_verdict(family: ExpertFamily) -> str:
    """Return what came out: how good the experts are on their own text and on the others', and which is best where."""
    ratios = [ratio_of(family.own(one)) for one in family.experts]
    low, high = (choose(ratios, key=lambda one: one.value).short() for choose in (min, max))
    trained = ", then trained" if any(one.is_trained for one in family.experts) else ""
    many = len(family.experts) > 1
    told = (
        f"{len(family.experts)} expert{'s' if many else ''} with {family.size.label}{trained}: on its own text, "
        f"{'an' if many else 'the'} expert's perplexity is {f'{low} to {high}' if low != high else low} {TIMES} the "
        "dense model's."
    )
    own = family.size.own_domains(family.matrix.domains)
    if len(own) < 2:
        return told
    best, sure = own_best(family.size, own)
    told += f" The own expert is the best of the family on its text in {best} of {len(own)} domains"
    told += f", in {sure or 'none'} surer than chance" if best else ""
    if (mean := family.size.mean_against(OTHERS)) is not None:
        ratio = ratio_of(mean)
        told += f"; its perplexity there is {ratio.short()} {TIMES} that of the other experts on average"
        told += f" (95 % interval {ratio.interval()})" if ratio.interval() else ""
    return f"{told}."


def experts_notes(family: ExpertFamily) -> list[str]:
    """Return what a careful reader holds against the numbers."""
    matrix = family.matrix
    notes = [f"{name}: {message}" for name, message in matrix.failures.items()]
    there = {one.name for one in family.experts}
    absent = [name for name in matrix.domains if name not in there and name not in matrix.failures]
    if absent:
        notes.append(f"No expert was asked for of {', '.join(absent)}.")
    notes += matrix.notes
    if few := [
        f"{name} ({one.num_documents})" for name, one in matrix.texts.items() if one.num_documents < FEW_DOCUMENTS
    ]:
        notes.append(few_documents(few))
    counts = [row.parameters for row in family.size.rows]
    if max(counts) / min(counts) > 1.001:
        notes.append(
            f"The experts keep from {format_count(min(counts))} to {format_count(max(counts))} parameters: a larger "
            "one should lose less, whatever it was calibrated on."
        )
    if random := [one.name for one in family.experts if _is_no_better_than_random(one)]:
        notes.append(f"On its own text no better than a random cut of the same size: {', '.join(random)}.")
    if GENERAL not in matrix.texts:
        notes.append("There is no general text, so nothing says what the experts forgot beside the other domains.")
    return notes


def _is_no_better_than_random(expert: Expert) -> bool:
    against = expert.against_random
    return against is not None and not against.mean < 0.0


def experts_tables(family: ExpertFamily) -> list[Table]:
    """Return every table: the experts, each on every text, each against the others, and the test text."""
    tables = [experts_table(family), matrix_table(family.matrix, family.size), own_table(family.size)]
    return [*(table for table in tables if table.rows), texts_table(family.matrix)]


def experts_table(family: ExpertFamily) -> Table:
    """Return one row per expert: its size, and its perplexity over the dense model's where it matters."""
    trained = any(one.is_trained for one in family.experts)
    controlled = any(one.against_random is not None for one in family.experts)
    columns = ["expert", "parameters", "weights", "own text"]
    columns += ["own text, as cut"] if trained else []
    columns += ["other domains", "general text"] + (["own text, beside a random cut"] if controlled else [])
    rows = []
    for one in family.experts:
        row = family.row(one)
        share = row.parameters / family.matrix.parameters_dense - 1
        cells = [one.name, f"{format_count(row.parameters)} ({share:+.1%})", format_bytes(one.size_bytes)]
        cells.append(_shown(family.own(one)))
        cells += [_shown(one.as_cut)] if trained else []
        cells += [_shown(family.elsewhere(one)), _shown(family.general(one))]
        cells += [_shown(one.against_random)] if controlled else []
        rows.append(cells)
    return Table("the experts: perplexity / dense (± one standard error)", columns, rows)


def _shown(difference: PairedDifference | None) -> str:
    if difference is None:
        return NOT_MEASURED
    ratio = ratio_of(difference)
    return with_error(ratio.value, ratio.stderr)


def places_table(family: ExpertFamily) -> Table:
    """Return where each expert's model and exports lie, below the family's folder where they are in it."""
    rows = []
    for one in family.experts:
        places = [one.model, *one.exports]
        rows += [[one.name if place == one.model else "", _below(place, one)] for place in places]
    return Table("where they lie, in the folder of the family", ["expert", "folder or file"], rows)


def _below(place: str, expert: Expert) -> str:
    root = Path(expert.folder).parent.parent
    path = Path(place)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else place
