"""A comparison of runs in words and tables, for the terminal and for Markdown; its page is made of the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.records.comparison import (
    ComparedRun,
    Comparison,
    Judgement,
    Overlap,
    TextDifference,
)
from secateur.records.evaluation import ModelScore, PairedDifference, paired_difference
from secateur.records.units import UNIT_NAMES, VOCABULARY
from secateur.report.page.cautions import FEW_DOCUMENTS
from secateur.report.page.records import DENSE, TIMES, Ratio, ratio_of
from secateur.report.tables import Table, format_bytes, format_count, with_error

_MANY = 3
"""More runs than that beside the baseline are counted in the verdict and not named."""

FEW_SHARED = (
    "Alike is the number of units that both keep over the number that either keeps. By chance is what two draws of as "
    "many units would give: only what is above it says that two runs chose the same."
)


def words(judgement: Judgement) -> str:
    """Return a judgement as people say it."""
    return {
        "better": "better, surer than chance",
        "worse": "worse, surer than chance",
        "no clear difference": "no clear difference",
        "the same": "the same",
        "unknown": "unknown: one document",
        "no signal": "no signal: dense is no better than a guess",
    }[judgement]


def comparison_verdict(comparison: Comparison) -> str:
    """Return what came out, in sentences: size and loss of every run against the baseline, or counts of many."""
    base = comparison.baseline
    domains = [name for name in comparison.buckets if name in base.domains] or list(comparison.buckets)
    if len(comparison.others) > _MANY:
        return " ".join(_counted(comparison, bucket) for bucket in domains)
    sentences = []
    for run in comparison.others:
        found = [one for one in comparison.texts if one.run == run.name and one.bucket in domains]
        losses = "; ".join(_loss_sentence(one, base.name) for one in found)
        sentences.append(f"{run.name} {_size_against(run, base)}; {losses}.")
    return " ".join(sentences)


def _size_against(run: ComparedRun, base: ComparedRun) -> str:
    change = run.result.total_parameters / base.result.total_parameters - 1
    if run.result.total_parameters == base.result.total_parameters:
        return f"has as many parameters as {base.name}"
    return f"has {abs(change):.1%} {'more' if change > 0 else 'fewer'} parameters than {base.name}"


def _loss_sentence(one: TextDifference, base: str) -> str:
    ratio = ratio_of(one.nll)
    if one.judgement == "the same":
        return f"on held-out {one.bucket} text its loss is the same"
    told = f"on held-out {one.bucket} text its perplexity is {with_error(ratio.value, ratio.stderr)} {TIMES} that of "
    told += f"{base}: {words(one.judgement)}"
    return told + (f" (95 % interval {ratio.interval()})" if ratio.interval() else "")


def _counted(comparison: Comparison, bucket: str) -> str:
    best = min(comparison.runs, key=lambda run: run.result.text[bucket].bits_per_byte)
    found = [one.judgement for one in comparison.texts if one.bucket == bucket]
    return (
        f"On held-out {bucket} text {best.name} has the lowest loss of {len(comparison.runs)} runs; against "
        f"{comparison.baseline.name}, {found.count('better')} are better and {found.count('worse')} worse, surer than "
        f"chance, and {len(found) - found.count('better') - found.count('worse')} show no clear difference."
    )


def comparison_notes(comparison: Comparison) -> list[str]:
    """Return what a careful reader holds against the numbers."""
    notes = list(comparison.notes)
    counts = {bucket: comparison.baseline.dense.text[bucket].num_documents for bucket in comparison.buckets}
    if few := [f"{bucket} ({count})" for bucket, count in counts.items() if count < FEW_DOCUMENTS]:
        notes.append(few_documents(few))
    judged = len(comparison.texts) + len(comparison.answers)
    if judged >= 10:
        notes.append(
            f"{judged} differences are judged here, each with 95 % confidence: about {judged / 20:.0f} would look sure "
            "by chance alone. Confirm the one that you rely on with text that no choice has seen."
        )
    sizes = [run.result.total_parameters for run in comparison.runs]
    if max(sizes) / min(sizes) > 1.02:
        notes.append("The models are not of one size: a larger one should lose less, whatever was done to it.")
    if any(run.plan.vocabulary is not None for run in comparison.runs):
        notes.append(
            "Tokenizers differ: perplexities of different rows do not compare. Ratios and bits/byte do, because they "
            "take the loss on the same text."
        )
    return notes


def few_documents(texts: Sequence[str]) -> str:
    """Return a warning of texts with few documents."""
    return (
        f"Measured on fewer than {FEW_DOCUMENTS} documents: {', '.join(texts)}. The intervals are themselves uncertain "
        "there. Raise evaluate.max_tokens."
    )


def compared_table(comparison: Comparison) -> Table:
    """Return the dense model once (or each of several), and the result of every run, on every shared text."""
    columns = ["run", "model", "parameters", "weights"]
    for bucket in comparison.buckets:
        columns += [f"{bucket} perplexity", f"{bucket} bits/byte", f"{bucket} ppl / dense"]
    several = len({run.model_fingerprint for run in comparison.runs}) > 1
    rows, seen = [], set()
    for run in comparison.runs:
        if run.model_fingerprint not in seen:
            seen.add(run.model_fingerprint)
            rows.append(_row(f"dense of {run.name}" if several else DENSE, run.dense, run.dense, comparison.buckets))
    rows += [_row(run.name, run.result, run.dense, comparison.buckets) for run in comparison.runs]
    return Table("held-out results (± one standard error)", columns, rows)


def _row(name: str, model: ModelScore, dense: ModelScore, buckets: Sequence[str]) -> list[str]:
    share = model.total_parameters / dense.total_parameters - 1
    size = format_count(model.total_parameters) + (f" ({share:+.1%})" if model is not dense else "")
    row = [name, model.name, size, format_bytes(model.size_bytes)]
    for bucket in buckets:
        score = model.text[bucket]
        to_dense = ratio_of(paired_difference(score, dense.text[bucket]))
        row.append(with_error(score.perplexity, score.perplexity_stderr))
        row.append(with_error(score.bits_per_byte, score.bits_per_byte_stderr))
        row.append("1" if model is dense else with_error(to_dense.value, to_dense.stderr))
    return row


def differences_table(comparison: Comparison) -> Table:
    """Return how every run differs from the baseline on every text, paired by document."""
    base = comparison.baseline.name
    columns = ["text", "run", "bits/byte", "loss", f"perplexity / {base}", "95 % interval", "verdict"]
    rows = []
    for one in comparison.texts:
        ratio = ratio_of(one.nll)
        cells = [signed(one.bits_per_byte), signed(one.relative, percent=True)]
        cells += [with_error(ratio.value, ratio.stderr), ratio.interval() or "unknown", words(one.judgement)]
        rows.append([one.bucket, one.run, *cells])
    return Table(f"differences from {base} on the same documents (± one standard error)", columns, rows)


def answers_table(comparison: Comparison) -> Table:
    """Return how every run's answers differ from the baseline's, paired by question; no rows where none were asked."""
    columns = ["questions", "run", "acc (%)", "difference", "p", "acc_norm (%)", "difference", "verdict"]
    rows = []
    for name in comparison.questions:
        score = comparison.baseline.result.choices[name]
        shares = [with_error(100 * score.acc, 100 * score.acc_stderr), "", ""]
        shares += [with_error(100 * score.acc_norm, 100 * score.acc_norm_stderr), "", ""]
        rows.append([name, comparison.baseline.name, *shares])
        for run in comparison.others:
            one = next(each for each in comparison.answers if (each.run, each.questions) == (run.name, name))
            score = run.result.choices[name]
            cells = [with_error(100 * score.acc, 100 * score.acc_stderr), signed(one.acc, percent=True)]
            cells.append(f"{one.p_value:.2g}")
            cells.append(with_error(100 * score.acc_norm, 100 * score.acc_norm_stderr))
            rows.append([name, run.name, *cells, signed(one.acc_norm, percent=True), words(one.judgement)])
    return Table(f"answers, and differences from {comparison.baseline.name} on the same questions", columns, rows)


def signed(difference: PairedDifference, *, percent: bool = False) -> str:
    """Return a difference with its sign and standard error, such as +0.0121 ± 0.0034."""
    scale = 100.0 if percent else 1.0
    mean, stderr = scale * difference.mean, scale * difference.stderr
    sign = "+" if mean > 0 else ""
    shown = sign + with_error(mean, stderr if math.isfinite(stderr) else 0.0)
    return f"{shown} %" if percent else shown


def overlap_table(comparison: Comparison) -> Table:
    """Return how many units every run has in common with the baseline, per kind; no rows where that is not known."""
    base = comparison.baseline.name
    columns = ["unit", "run", "of", f"{base} keeps", "keeps", "in common", "alike", "by chance"]
    rows = []
    found = [(plan.kind, plan.run, plan.total, plan.alike_by_chance) for plan in comparison.plans]
    found += [(VOCABULARY, run, one, one.alike_by_chance) for run, one in comparison.vocabularies.items()]
    for kind, run, one, by_chance in found:
        if min(one.kept, one.kept_baseline) < one.num_units:
            rows.append([UNIT_NAMES[kind], run, *_overlap_cells(one, by_chance)])
    return Table(f"units in common with {base}", columns, rows)


def _overlap_cells(one: Overlap, by_chance: float) -> list[str]:
    counts = (one.num_units, one.kept_baseline, one.kept, one.shared)
    return [*(f"{count:,}" for count in counts), f"{one.alike:.3f}", f"{by_chance:.3f}"]


def layer_tables(comparison: Comparison) -> list[Table]:
    """Return per kind of unit a table with a row per layer: what every run keeps, and how alike that is."""
    tables = []
    for kind in dict.fromkeys(plan.kind for plan in comparison.plans):
        plans = [plan for plan in comparison.plans if plan.kind == kind]
        columns = ["layer", "of", f"{comparison.baseline.name} keeps"]
        for plan in plans:
            columns += [f"{plan.run} keeps", "in common", "alike"]
        rows = []
        for layer, first in enumerate(plans[0].layers):
            row = [str(layer), f"{first.num_units:,}", f"{first.kept_baseline:,}"]
            for plan in plans:
                one = plan.layers[layer]
                row += [f"{one.kept:,}", f"{one.shared:,}", f"{one.alike:.3f}"]
            rows.append(row)
        tables.append(Table(f"{UNIT_NAMES[kind]} by layer", columns, rows))
    return tables


def recipes_table(comparison: Comparison) -> Table:
    """Return the recipe keys that differ, with every run's value; no rows where none do."""
    names = [run.name for run in comparison.runs]
    rows = [[key, *(values[name] for name in names)] for key, values in comparison.recipes.items()]
    return Table("what the recipes have different", ["key", *names], rows)


def runs_table(comparison: Comparison) -> Table:
    """Return where the runs lie, and what they were made from."""
    rows = [
        [run.name, run.folder, run.model, run.model_fingerprint[:12], run.plan.method, run.result.name]
        for run in comparison.runs
    ]
    return Table("runs", ["run", "folder", "dense model", "its fingerprint", "method", "compared row"], rows)


def text_table(comparison: Comparison) -> Table:
    """Return on which text the runs were measured."""
    rows = []
    for bucket in comparison.buckets:
        score = comparison.baseline.dense.text[bucket]
        counts = (score.num_documents, score.num_tokens, score.num_bytes)
        rows.append([bucket, *(f"{count:,}" for count in counts), score.corpus_fingerprint[:16]])
    return Table("test text, the same in all runs", ["text", "documents", "dense tokens", "bytes", "fingerprint"], rows)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return every table that has rows, in the order of interest."""
    tables = [compared_table(comparison), differences_table(comparison), answers_table(comparison)]
    tables += [overlap_table(comparison), *layer_tables(comparison), recipes_table(comparison)]
    return [table for table in [*tables, text_table(comparison), runs_table(comparison)] if table.rows]


def comparison_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown, for a pull request or a notebook."""
    notes = "".join(f"- {note}\n" for note in comparison_notes(comparison))
    tables = "\n".join(
        f"## {one.title[:1].upper()}{one.title[1:]}\n\n{one.markdown()}\n" for one in comparison_tables(comparison)
    )
    title = f"# {', '.join(run.name for run in comparison.others)} against {comparison.baseline.name}\n"
    return f"{title}\n{comparison_verdict(comparison)}\n\n" + (f"{notes}\n" if notes else "") + tables


def shown_interval(ratio: Ratio) -> str:
    """Return a ratio with its interval in words."""
    return f"{ratio.short()} {TIMES} (95 % interval {ratio.interval() or 'unknown'})"
