"""A look at a vocabulary as tables and sentences: how often ids are used, and what keep rules cost."""

from __future__ import annotations

from secateur.records.survey import KeepRule, SurveyedText, VocabularySurvey
from secateur.report.tables import Table, format_bytes, format_count

IMPOSSIBLE = "cannot be met"


def texts_table(survey: VocabularySurvey) -> Table:
    """Return which text was counted, and on which the costs were measured."""
    texts = {
        "counted": survey.counted,
        "held out": survey.heldout,
        "other, counted": survey.other_counted,
        "other, held out": survey.other_heldout,
    }
    rows = [_text_row(name, text) for name, text in texts.items() if text is not None]
    return Table("text", ["text", "corpus", "documents", "tokens", "bytes", "tokens/byte"], rows)


def _text_row(name: str, text: SurveyedText) -> list[str]:
    sizes = [f"{size:,}" for size in (text.num_documents, text.num_tokens, text.num_bytes)]
    return [name, text.name, *sizes, f"{text.num_tokens / text.num_bytes:.4f}"]


def frequency_table(survey: VocabularySurvey) -> Table:
    """Return how much text the most used ids cover; the last row has all ids that occur in the counted text."""
    columns = ["most used ids", "of counted text", "of held-out text", "uses of the last, per million"]
    if survey.other_counted is not None:
        columns += ["of other text", "also among the other's"]
    rows = []
    for entry in survey.frequencies:
        row = [f"{entry.num_ids:,}", f"{entry.coverage:.3%}", f"{entry.heldout_coverage:.3%}"]
        row.append(f"{entry.per_million:,.4g}" if entry.per_million < 1000 else f"{entry.per_million:,.0f}")
        if entry.other_coverage is not None and entry.overlap is not None:
            row += [f"{entry.other_coverage:.3%}", f"{entry.overlap:.1%}"]
        rows.append(row)
    if rows:
        rows[-1][0] += " (all)"
    return Table("token frequency", columns, rows)


def rules_table(survey: VocabularySurvey) -> Table:
    """Return what each keep rule keeps, saves and costs on held-out text."""
    columns = [
        "keep rule",
        "ids kept",
        "of these not by the rule",
        "of all ids",
        "parameters",
        "of the model",
        "weights",
        "held-out tokens that go",
        "documents touched",
        "inflation",
    ]
    if survey.other_counted is not None:
        columns.append("inflation of other text")
    rows = [_rule_row(rule, survey) for rule in survey.rules]
    return Table("keep rules", columns, [row + [""] * (len(columns) - len(row)) for row in rows])


def _rule_row(rule: KeepRule, survey: VocabularySurvey) -> list[str]:
    if rule.heldout is None:
        return [rule.label, IMPOSSIBLE]
    return [
        rule.label,
        f"{rule.num_kept:,}",
        f"{rule.num_kept - rule.num_chosen:,}",
        f"{rule.num_kept / survey.num_rows:.1%}",
        f"-{format_count(rule.parameters_removed)}",
        f"-{rule.parameters_removed / survey.total_parameters:.1%}",
        f"-{format_bytes(rule.bytes_saved)}",
        _percent(rule.heldout.lost_ratio),
        _percent(rule.heldout.touched_ratio),
        *(_percent(cost.inflation, sign="+") for cost in (rule.heldout, rule.other) if cost is not None),
    ]


def _percent(ratio: float, sign: str = "") -> str:
    """Return a share in per cent, with more digits the smaller it is."""
    value = 100 * ratio
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:{sign}.{digits}f}%"


def survey_notes(survey: VocabularySurvey) -> list[str]:
    """Return what belongs beside the tables, a sentence or two each."""
    notes = [f"{rule.label} {IMPOSSIBLE}: {rule.problem}" for rule in survey.rules if rule.problem]
    notes.append(
        f"family {survey.family}, {survey.tokenizer_kind} tokenizer: {survey.num_ids:,} ids, {survey.num_rows:,} rows "
        f"in the embedding, {survey.num_rows - survey.num_ids:,} of them without a token. At least "
        f"{survey.smallest_size:,} ids must stay."
    )
    if survey.num_unreachable:
        notes.append(
            f"{survey.num_unreachable:,} tokens are made by no merge; no other token needs them, and they stay only "
            "where a rule or a list names them."
        )
    notes.append(
        "Inflation means longer sequences: more steps to read and to write the same text. What a rule costs in loss is "
        "known only after `secateur run` has measured it."
    )
    return notes
