"""Cus-Prun two ways at equal removed parameters: neurons at zero as published, and whole units cut.

    python benchmarks/published.py --domain 'medicine=CALIBRATION,TEST::TEMPLATE' --general PATH

A quarter of the weights of all blocks goes. Finished rows and the neurons' impacts are kept, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from vocabulary import parse_domain

import secateur
from secateur.calibrate.neurons import collect_neuron_impacts
from secateur.corpus import load_split
from secateur.demo import demo_recipe, prepare
from secateur.families.geometry import build_geometry
from secateur.families.loader import family_of
from secateur.published import irrelevant, with_zeros
from secateur.records.evaluation import TextScore, paired_difference
from secateur.records.impacts import ImpactStatistics
from secateur.records.statistics import Statistics
from secateur.report.tables import with_error
from secateur.store.artifacts import digest, read_impacts, write_impacts
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

RATIO = 0.25
BLOCK_SIZE = 256


class _Bench:
    def __init__(self, store: Path, options: argparse.Namespace) -> None:
        (self.name, self.domain), general = parse_domain(options.domain), options.general
        self.texts = {self.name: self.domain, "general": parse_domain(f"general={general}")[1]}
        self.tokens, self.test_tokens = options.calibration_tokens, options.test_tokens
        self.source = options.model or demo_recipe(prepare(), store / "unused").model
        self.folder = store / "published" / digest(self.source, self.name, self.tokens, self.test_tokens)[:8]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: Mapping[str, Callable[[], tuple[Any, float]]] = {
            "dense": lambda: (self.model, 0.0),
            "zeroed, largest rank (as published)": lambda: self.zeroed("rank"),
            "cut, channels, largest rank": lambda: self.cut("rank"),
            "zeroed, mean rank": lambda: self.zeroed("mean_rank"),
            "cut, channels, mean rank": lambda: self.cut("mean_rank"),
        }

    @cached_property
    def model(self) -> Any:
        return load_model(resolve_model(self.source))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(resolve_model(self.source))

    @cached_property
    def geometry(self) -> Any:
        return build_geometry(family_of(self.model.config.model_type), self.model.config.to_dict())

    @cached_property
    def statistics(self) -> Statistics:
        return secateur.calibrate(
            self.model, self.tokenizer, self.domain, impacts=True, max_tokens=self.tokens, block_size=BLOCK_SIZE
        )

    @cached_property
    def impacts(self) -> ImpactStatistics:
        file = self.folder / "neurons.safetensors"
        if not file.is_file():
            started = time.perf_counter()
            blocks = load_split(
                self.domain,
                "calibration",
                self.tokenizer,
                block_size=BLOCK_SIZE,
                max_tokens=self.tokens,
                name=self.name,
            )
            write_impacts(file, collect_neuron_impacts(self.model, blocks, self.geometry), {"bucket": self.name})
            print(f"impacts of neurons: {time.perf_counter() - started:.0f} s", flush=True)
        return read_impacts(file)

    def zeroed(self, relevance: Any) -> tuple[Any, float]:
        made = with_zeros(self.model, self.geometry, irrelevant([self.impacts], RATIO, relevance))
        return made.model, made.num_zeroed / made.num_weights

    def cut(self, relevance: str) -> tuple[Any, float]:
        layer = self.model.get_submodule(self.geometry.layer_name(0))
        weights = sum(each.numel() for each in layer.parameters() if each.dim() > 1)
        of_a_channel = sum(each.shape[0] for each in (layer.mlp.gate_proj.weight.T, layer.mlp.up_proj.weight.T))
        of_a_channel += layer.mlp.down_proj.weight.shape[0]
        channels = RATIO * weights / of_a_channel / self.geometry.dimensions["intermediate_size"]
        plan = secateur.plan(
            self.model,
            self.statistics,
            method="cus_prun",
            budget={"channels": channels},
            options={"relevance": relevance},
        )
        gone = sum(each.num_removed for each in plan.layers["ffn_channel"]) * of_a_channel
        return secateur.shrink(self.model, plan), gone / (weights * self.geometry.num_layers)

    def row(self, title: str) -> dict[str, Any]:
        """Return a row's share of removed weights and its scores; measured once, then read back."""
        file = self.folder / f"{digest(title)[:8]}.json"
        if not file.is_file():
            model, gone = self.rows[title]()
            scores = {
                name: asdict(
                    secateur.evaluate(model, self.tokenizer, text, max_tokens=self.test_tokens, exclude=self.statistics)
                )
                for name, text in self.texts.items()
            }
            parameters = sum(each.numel() for each in model.parameters())
            file.write_text(json.dumps({"title": title, "gone": gone, "parameters": parameters, "scores": scores}))
            print(f"{title}: done", flush=True)
        return dict(json.loads(file.read_text()))


def _score(data: Mapping[str, Any]) -> TextScore:
    lists = ("document_nll", "document_tokens", "document_bytes")
    return TextScore(**{**data, **{key: tuple(data[key]) for key in lists}})


def measure(store: Path, options: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    bench = _Bench(store, options)
    found = {title: bench.row(title) for title in bench.rows}
    names = list(bench.texts)
    lines = [
        f"| model | block weights gone | parameters left | {' | '.join(f'{n} perplexity | / dense' for n in names)} |",
        f"|---|---:|---:|{'---:|---:|' * len(names)}",
    ]
    for title, row in found.items():
        cells = []
        for name in names:
            score, dense = _score(row["scores"][name]), _score(found["dense"]["scores"][name])
            difference = paired_difference(score, dense)
            ratio = math.exp(difference.mean)
            cells += [
                with_error(score.perplexity, score.perplexity_stderr),
                with_error(ratio, ratio * difference.stderr),
            ]
        lines.append(f"| {title} | {row['gone']:.1%} | {row['parameters']:,} | {' | '.join(cells)} |")
    titles = list(found)
    for zeroed, cut in ((titles[1], titles[2]), (titles[3], titles[4])):
        for name in names:
            pair = paired_difference(_score(found[cut]["scores"][name]), _score(found[zeroed]["scores"][name]))
            ratio = math.exp(pair.mean)
            lines.append(f"\n{cut} over {zeroed}, {name}: {with_error(ratio, ratio * pair.stderr)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="of a family with separate gate_proj, up_proj, down_proj; default: the demo's")
    parser.add_argument("--domain", required=True, metavar="NAME=CALIBRATION,TEST[::TEMPLATE]")
    parser.add_argument("--general", required=True, metavar="PATH[::TEMPLATE]")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--test-tokens", type=int, default=2048)
    parser.add_argument("--store", type=Path, default=Path(__file__).resolve().parent.parent / "runs" / "bench")
    options = parser.parse_args(arguments)
    print(measure(options.store, options))


if __name__ == "__main__":
    main()
