"""Several domains in one model: the mean of their texts, the union of their ranks, and the mixture that a guard finds.

    python benchmarks/guard.py --domain 'medicine=CALIBRATION,VALIDATION,TEST::TEMPLATE' --domain 'law=PATH::TEMPLATE'

All rows share a run folder, so the dense model is calibrated and measured there once; finished rows are kept, and a
stopped guard goes on with the mixtures it has measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocabulary import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.records.evaluation import Evaluation, ModelScore, PairedDifference, relative_rise
from secateur.report.tables import with_error
from secateur.store.artifacts import digest, read_json, write_json

CALIBRATION_TOKENS, TEST_TOKENS = 4_096, 2_048
ROWS: Mapping[str, Mapping[str, Any]] = {
    "mean": {"combine": "mean"},
    "union": {"combine": "union"},
    "guard": {"combine": "guard", "guard": {"steps": 4}},
}
"""What each row adds to the ``prune`` section."""


class _Bench:
    def __init__(self, store: Path, options: argparse.Namespace) -> None:
        domains = dict(map(parse_domain, options.domain))
        self.folder = store / "guard" / digest(options.model, list(domains), options.method, options.channels)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prune = {"method": options.method, "budget": {"channels": options.channels}}
        self.recipe = {
            "model": options.model or demo_recipe(prepare(), store / "unused").model,
            "domain": {name: spec.model_dump(exclude_defaults=True) for name, spec in domains.items()},
            "calibrate": {"max_tokens": options.calibration_tokens},
            "evaluate": {"max_tokens": options.test_tokens, "controls": ["random"]},
            "output": str(self.folder / "run"),
        }

    def row(self, title: str) -> dict[str, Any]:
        """Return what a row's run made; run once, then read back."""
        prune = {**self.prune, **ROWS[title]}
        file = self.folder / f"{title}-{digest(prune, self.recipe)[:8]}.json"
        if not file.is_file():
            started = time.perf_counter()
            controls = ["random"] if title == "mean" else []
            evaluate = {**self.recipe["evaluate"], "controls": controls}
            made = secateur.run({**self.recipe, "evaluate": evaluate, "prune": prune}, until="evaluate")
            assert made.evaluation is not None and made.plan is not None
            tried = self.folder / "run" / "search" / "guard.json"
            write_json(
                file,
                {
                    "evaluation": made.evaluation.to_dict(),
                    "mix": dict(made.plan.mix),
                    "notes": list(made.plan.notes),
                    "mixtures": read_json(tried)["mixtures"] if title == "guard" else [],
                    "seconds": time.perf_counter() - started,
                },
            )
            print(f"{title}: done in {time.perf_counter() - started:.0f} s", flush=True)
        return dict(read_json(file))


def _rises(row: ModelScore, dense: ModelScore) -> dict[str, PairedDifference]:
    return {name: relative_rise(score, dense.text[name]) for name, score in row.text.items()}


def _cells(title: str, rises: Mapping[str, PairedDifference], weights: str) -> str:
    worst = max(rises, key=lambda name: rises[name].mean)
    cells = [with_error(100 * rise.mean, 100 * rise.stderr) for rise in rises.values()]
    return f"| {title} | {' | '.join(cells)} | {100 * rises[worst].mean:.1f} ({worst}) | {weights} |"


def measure(store: Path, options: argparse.Namespace) -> str:
    """Return the tables as Markdown."""
    bench = _Bench(store, options)
    made = {title: bench.row(title) for title in ROWS}
    found = {title: Evaluation.from_dict(row["evaluation"]).models for title, row in made.items()}
    names = list(found["mean"]["dense"].text)
    lines = [
        f"Rise of the loss on test text over the dense model's, in %: {options.channels:.0%} of the FFN channels, "
        f"{options.method}, {options.calibration_tokens:,} calibration tokens, and up to {options.test_tokens:,} "
        "validation and as many test tokens of each text.",
        "",
        f"| texts together by | {' | '.join(names)} | worst | weights |",
        f"|---|{'---:|' * len(names)}---:|---|",
    ]
    for title, models in found.items():
        weights = ", ".join(f"{name} {share:.2f}" for name, share in made[title]["mix"].items())
        lines.append(_cells(title, _rises(models["pruned"], models["dense"]), weights))
    lines.append(_cells("random cut", _rises(found["mean"]["random"], found["mean"]["dense"]), ""))
    lines += ["", "Over the mean, paired by document (percent of the mean's loss):", ""]
    for title in ("union", "guard"):
        rises = _rises(found[title]["pruned"], found["mean"]["pruned"])
        said = ", ".join(f"{name} {with_error(100 * r.mean, 100 * r.stderr)}" for name, r in rises.items())
        lines.append(f"- {title}: {said}")
    lines += ["", "Mixtures that the guard tried, and the rises on validation text, in %:", ""]
    lines += [
        f"| {' | '.join(f'weight of {n}' for n in names)} | {' | '.join(names)} |",
        f"|{'---:|' * (2 * len(names))}",
    ]
    for mixture in made["guard"]["mixtures"]:
        weights = " | ".join(f"{mixture['weights'][name]:.3f}" for name in names)
        rises = " | ".join(with_error(100 * mean, 100 * error) for mean, error in map(mixture["rises"].get, names))
        lines.append(f"| {weights} | {rises} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=PATH[,[VALIDATION,]TEST][::TEMPLATE]")
    parser.add_argument("--method", default="activation_norm")
    parser.add_argument("--channels", type=float, default=0.25)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--test-tokens", type=int, default=TEST_TOKENS)
    parser.add_argument("--store", type=Path, default=Path(__file__).resolve().parent.parent / "runs" / "bench")
    options = parser.parse_args(arguments)
    if len(options.domain) < 2:
        parser.error("give two domains or more")
    print(measure(options.store, options))


if __name__ == "__main__":
    main()
