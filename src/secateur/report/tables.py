"""The tables of a run as plain rows of text, for the terminal, for Markdown and for the model card alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.records.evaluation import (
    CONFIDENCE_95,
    Evaluation,
    ModelScore,
    PairedDifference,
    TextScore,
    paired_bits_per_byte,
    paired_difference,
    relative_rise,
)
from secateur.records.plan import Plan, VocabularyPlan, format_ranges
from secateur.records.units import (
    ATTENTION,
    AXES_OF,
    EXPERT,
    EXPERT_CHANNEL,
    FFN,
    FFN_CHANNEL,
    GQA_GROUP,
    LAYER,
    PARTS,
    QUERY_HEAD,
    SHARED_CHANNEL,
    SUBLAYER_OF,
    UNIT_NAMES,
    VOCABULARY,
)

SEGMENTATION_NOTE = (
    "The tokenizer changed, so a perplexity per token is not comparable between rows. Compare bits/byte, or "
    "ppl / dense, which takes the loss on the same text per token of the dense model."
)


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column heads and rows; the first column is text, the others are numbers already formatted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in GitHub Markdown."""
        rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.columns))) + "|"
        return "\n".join([_markdown_row(self.columns), rule, *map(_markdown_row, self.rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    shown = (" ".join(cell.split()).replace("|", r"\|").replace("<", "&lt;") for cell in cells)
    return "| " + " | ".join(shown) + " |"


def format_count(count: int | float) -> str:
    """Return a parameter count such as 134.5 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def format_bytes(size: int | float) -> str:
    """Return a size in decimal units such as 538.1 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def with_error(value: float, error: float) -> str:
    """Return a value and its standard error with digits that mean something, such as 12.03 ± 0.21."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def _ratio_to_dense(score: TextScore, dense: TextScore) -> str:
    difference = paired_difference(score, dense)
    ratio = math.exp(min(difference.mean, 700.0))
    return with_error(ratio, ratio * difference.stderr)


def result_table(evaluation: Evaluation) -> Table:
    """Return the table a newcomer reads: every model's size and its loss on every bucket's held-out text."""
    dense = next(iter(evaluation.models.values()))
    buckets = list(dense.text)
    columns = ["model", "parameters", "weights"]
    for bucket in buckets:
        columns += [f"{bucket} perplexity", f"{bucket} bits/byte", f"{bucket} ppl / dense"]
    rows = [_result_row(model, dense, buckets) for model in evaluation.models.values()]
    return Table("held-out results (± one standard error)", columns, rows)


def _result_row(model: ModelScore, dense: ModelScore, buckets: Sequence[str]) -> list[str]:
    share = model.total_parameters / dense.total_parameters - 1
    size = format_count(model.total_parameters) + (f" ({share:+.1%})" if model is not dense else "")
    row = [model.name, size, format_bytes(model.size_bytes)]
    for bucket in buckets:
        score = model.text[bucket]
        row.append(with_error(score.perplexity, score.perplexity_stderr))
        row.append(with_error(score.bits_per_byte, score.bits_per_byte_stderr))
        row.append("1" if model is dense else _ratio_to_dense(score, dense.text[bucket]))
    return row


def evidence_table(evaluation: Evaluation) -> Table:
    """Return on how much text each bucket was measured."""
    dense = next(iter(evaluation.models.values()))
    rows = [
        [
            bucket,
            f"{score.num_documents:,}",
            f"{score.num_tokens:,}",
            f"{score.num_bytes:,}",
            f"{score.num_excluded:,}",
            score.corpus_fingerprint[:12],
        ]
        for bucket, score in dense.text.items()
    ]
    return Table(
        "test text",
        ["bucket", "documents", "predicted tokens", "bytes", "excluded (seen in calibration)", "fingerprint"],
        rows,
    )


_PARTS_OF = {
    FFN_CHANNEL: ("ffn",),
    GQA_GROUP: ("attention",),
    QUERY_HEAD: ("attention",),
    EXPERT: ("ffn",),
    EXPERT_CHANNEL: ("ffn",),
    SHARED_CHANNEL: ("ffn",),
    VOCABULARY: ("embedding", "head"),
}


def removed_blocks(plan: Plan) -> str:
    """Return which layers go whole, and which lose a whole sub-layer, in short; nothing where none do.

    For example ``layers removed: 13-14; attention removed: 20``; layers are numbered as in the dense model.
    """
    gone = {"layers": plan.removed_layers, **{kind: plan.removed_sublayers(kind) for kind in (ATTENTION, FFN)}}
    return "; ".join(f"{what} removed: {format_ranges(layers)}" for what, layers in gone.items() if layers)


def cut_table(plan: Plan) -> Table:
    """Return what was removed of each kind of unit, and how much of the saving came from it.

    Units that went with a whole layer or sub-layer are counted with their kind; such blocks have rows of their own
    without parameters, which are in the other rows already.
    """
    counts = {
        kind: (sum(layer.num_removed for layer in layers), sum(layer.num_units for layer in layers))
        for kind, layers in plan.layers.items()
        if (kind != GQA_GROUP or QUERY_HEAD not in plan.layers)  # then groups go only with their sub-layers
        and any(layer.num_units for layer in layers)
    }
    if plan.vocabulary is not None:
        counts[VOCABULARY] = (plan.vocabulary.num_removed, plan.vocabulary.num_tokens)
    saved = plan.total_dense - plan.total_pruned
    rows = []
    for kind, (gone, total) in counts.items():
        owned = sum(plan.parameters_dense[part] - plan.parameters_pruned[part] for part in _PARTS_OF[kind])
        share = f"{owned / saved:.1%}" if saved else ""
        beside = [other for other in counts if SUBLAYER_OF.get(other) == FFN == SUBLAYER_OF.get(kind)]
        if len(beside) > 1:  # the plan does not say how much of the FFNs each of them owned
            share = f"{share} in all ({', '.join(UNIT_NAMES[other] for other in beside)})" if kind == beside[0] else ""
        shown = f"{owned:,}" if share or not saved or len(beside) < 2 else ""
        rows.append([UNIT_NAMES[kind], f"{gone:,}", f"{total:,}", f"{gone / total:.1%}", shown, share])
    rows += _block_rows(plan)
    return Table("where the saving came from", ["unit", "removed", "of", "share", "parameters", "of the saving"], rows)


def _block_rows(plan: Plan) -> list[list[str]]:
    counts = {LAYER: (len(plan.removed_layers), len(next(iter(plan.layers.values()), ())))}
    for kind in (ATTENTION, FFN):
        parts = zip(*(plan.layers[axis] for axis in AXES_OF[kind] if axis in plan.layers), strict=True)
        there = sum(any(layer.num_units for layer in entries) for entries in parts)
        counts[kind] = (len(plan.removed_sublayers(kind)), there)
    return [
        [UNIT_NAMES[kind], str(gone), str(total), f"{gone / total:.1%}", "", ""]
        for kind, (gone, total) in counts.items()
        if gone
    ]


def vocabulary_table(vocabulary: VocabularyPlan) -> Table:
    """Return how many token ids stay for which reason."""
    rows = [[reason, f"{count:,}"] for reason, count in vocabulary.reasons.items()]
    rows.append(["all that stay", f"{len(vocabulary.keep):,}"])
    rows.append(["before", f"{vocabulary.num_tokens:,}"])
    return Table("token ids that stay", ["because", "ids"], rows)


def segmentation_table(evaluation: Evaluation) -> Table:
    """Return how the smaller vocabulary cuts the test text."""
    rows = []
    for bucket, effect in evaluation.vocabulary.items():
        size = effect.resegmented.num_bytes
        rows.append(
            [
                bucket,
                f"{effect.tokens_before / size:.4f}",
                f"{effect.tokens_after / size:.4f}",
                f"{effect.tokens_after / effect.tokens_before - 1:+.2%}",
                f"{effect.tokens_lost / effect.tokens_before:.2%}",
                f"{effect.documents_touched / effect.num_documents:.1%}",
            ]
        )
    columns = ["bucket", "tokens/byte dense", "pruned", "inflation", "tokens that went", "documents touched"]
    return Table("segmentation of the test text", columns, rows)


def attribution_table(evaluation: Evaluation) -> Table:
    """Return how the change in bits per byte adds up: segmentation, softmax, and the units of layers."""
    dense, pruned = evaluation.models["dense"], evaluation.models["pruned"]
    rows = []
    for bucket, effect in evaluation.vocabulary.items():
        before, after = dense.text[bucket], pruned.text[bucket]
        steps = [
            (effect.resegmented, before),
            (effect.restricted, effect.resegmented),
            (after, effect.restricted),
            (after, before),
        ]
        whole = before.bits_per_byte
        changes = [paired_bits_per_byte(first, second) for first, second in steps]
        rows.append([bucket, f"{whole:.4f}", *(_relative(change, whole) for change in changes)])
    columns = ["bucket", "dense bits/byte", "segmentation changed", "softmax restricted", "other units", "in all"]
    return Table("where the loss came from (bits/byte, relative to dense)", columns, rows)


def _relative(change: PairedDifference, whole: float) -> str:
    value, error = 100 * change.mean / whole, 100 * change.stderr / whole
    return f"{value:+.2f} % ± {error:.2f}" if math.isfinite(error) else f"{value:+.2f} %"


def parts_table(dense: Mapping[str, int], pruned: Mapping[str, int]) -> Table:
    """Return parameters by part, before and after."""
    rows = []
    for part in [*PARTS, "total"]:
        before = sum(dense.values()) if part == "total" else dense.get(part, 0)
        after = sum(pruned.values()) if part == "total" else pruned.get(part, 0)
        share = f"{after / before - 1:+.1%}" if before else ""
        rows.append([part, f"{before:,}", f"{after:,}", f"{after - before:+,}", share])
    return Table("parameters", ["part", "dense", "pruned", "change", "share"], rows)


def plan_table(plan: Plan) -> Table:
    """Return one row per layer: what stays of each kind, and the scores on both sides of the cut."""
    kinds = list(plan.layers)
    columns = ["layer"]
    for kind in kinds:
        columns += [f"{kind}s kept", "of", "highest score removed", "lowest score kept"]
    rows = []
    for index in range(len(plan.layers[kinds[0]])):
        row = [str(index)]
        for kind in kinds:
            layer = plan.layers[kind][index]
            row += [f"{len(layer.keep):,}", f"{layer.num_units:,}"]
            row += [_score(layer.highest_removed), _score(layer.lowest_kept)]
        rows.append(row)
    return Table("plan", columns, rows)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def speed_table(evaluation: Evaluation, calibration_tokens_per_s: Mapping[str, float]) -> Table:
    """Return the tokens/s of calibration and evaluation passes, as met in this run."""
    rows = [[f"calibrate {bucket}", f"{speed:,.0f}"] for bucket, speed in calibration_tokens_per_s.items() if speed]
    for model in evaluation.models.values():
        rows += [[f"evaluate {model.name} on {b}", f"{s.tokens_per_s:,.0f}"] for b, s in model.text.items()]
        rows += [[f"ask {model.name} {name}", f"{s.tokens_per_s:,.0f}"] for name, s in model.choices.items()]
    return Table("speed of this run", ["pass", "tokens/s"], rows)


_BESIDE = {
    "pruned": "without recovery",
    "random": "random pruning at the same size",
    "random_recovered": "the same, after recovery",
}
"""What else a verdict names, and how."""


def verdict(evaluation: Evaluation, domains: Sequence[str], bounds: Mapping[str, float] | None = None) -> str:
    """Return one sentence per domain (smaller by how much, at what loss, against random) and one per bound."""
    models = evaluation.models
    dense, pruned = models["dense"], models["pruned"]
    best = models.get("recovered", pruned)
    smaller = 1 - best.total_parameters / dense.total_parameters
    sentences = []
    for bucket in domains:
        ratio = _ratio_to_dense(best.text[bucket], dense.text[bucket])
        trained = ", after recovery," if best is not pruned else ""
        text = f"{smaller:.1%} fewer parameters; perplexity on held-out {bucket} text{trained} is {ratio} x the dense "
        text += "model's"
        if best is not pruned and "dense_finetuned" in models:
            other = models["dense_finetuned"].text[bucket]
            beside = _ratio_to_dense(best.text[bucket], other)
            text += f" and {beside} x that of the dense model fine-tuned on the same text"
        aside = [
            f"{words}: {_ratio_to_dense(models[name].text[bucket], dense.text[bucket])} x"
            for name, words in _BESIDE.items()
            if name in models and models[name] is not best
        ]
        text += f" ({'; '.join(aside)})" if aside else ""
        sentences.append(text + ".")
    for bucket, bound in (bounds or {}).items():
        sentences.append(_bound_verdict(bucket, bound, relative_rise(pruned.text[bucket], dense.text[bucket])))
    return " ".join(sentences)


def _bound_verdict(bucket: str, bound: float, rise: PairedDifference) -> str:
    """Return whether the bound on a loss, kept on validation text, held on the test text too."""
    told = f"on {bucket} test text the loss rose by {rise.mean:.2%} ± {rise.stderr:.2%}, and {bound:.2%} were allowed"
    if rise.mean + CONFIDENCE_95 * rise.stderr <= bound:
        return f"The bound holds with 95 % confidence: {told}."
    if rise.mean <= bound:
        return f"The bound holds, but not with 95 % confidence: {told}."
    return f"The bound, kept on validation text, is broken: {told}."
