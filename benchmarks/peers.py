"""secateur beside other tools at equal size: the same model, calibration text and held-out text for all.

    python benchmarks/peers.py                        peers, then secateur at the size of each
    python benchmarks/peers.py --rows peers           the peers alone
    python benchmarks/peers.py --domain 'NAME=CALIBRATION,VALIDATION,TEST::TEMPLATE'

The peers come from PyPI into an environment of their own, runs/bench/peers/env, that sees the libraries of this one but
not secateur. Each is run by a script in peers_drivers. Rows are kept, so a stopped run goes on where it was; delete a
row's file to measure it again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import secateur
from secateur.corpus import PackedBlocks, load_split, resegment
from secateur.demo import demo_recipe, prepare
from secateur.errors import SecateurError, UnavailableError
from secateur.evaluate import evaluate_text
from secateur.families.loader import family_of
from secateur.recipe import CorpusSpec
from secateur.records.evaluation import TextScore, paired_bits_per_byte, paired_difference, ratio_estimate
from secateur.report.tables import with_error
from secateur.store.artifacts import digest, write_json
from secateur.store.checkpoints import load_tokenizer, resolve_model

CALIBRATION_TOKENS, TEST_TOKENS, BLOCK_SIZE = 32_768, 16_384, 512
DRIVER_SECONDS = 3_600
DRIVERS = Path(__file__).resolve().parent / "peers_drivers"
PACKAGES = {
    "optipfair": "0.4.2",
    "torch-pruning": "1.6.1",
    "mergekit": "0.1.5",
    "immutables": "0.21",
    "peft": "0.21.2",
}
"""What is installed for the peers, without dependencies; the last two are mergekit's."""

PEERS: dict[str, tuple[str, ...]] = {
    "OptiPFair hybrid, 20 % of FFN channels": ("with_optipfair.py", "--width", "20", "--hybrid"),
    "OptiPFair data-free, 20 % of FFN channels": ("with_optipfair.py", "--width", "20"),
    "OptiPFair depth, 6 of 30 layers": ("with_optipfair.py", "--layers", "6"),
    "mergekit, layers 20 to 25": ("with_mergekit.py", "--first", "20", "--last", "25"),
    "Torch-Pruning magnitude, 25 % of all widths": ("with_torch_pruning.py", "--ratio", "0.25"),
    "Torch-Pruning Taylor, 20 % of FFN channels": ("with_torch_pruning.py", "--ratio", "0.1998", "--ffn", "--taylor"),
}
"""Driver and its options by name of the row. A ratio of 0.1998 rounds to as many channels as OptiPFair's 20 %."""

_EXACT = {"multiple_of": 1}
_BOTH = {"units": ["ffn_channel", "vocabulary"], "vocabulary": {"min_count": 1}}
_BEST = {"method": "kfac", "reconstruct": "pruned"}
SECATEUR: dict[str, dict[str, Any]] = {
    "activation norm": {"method": "activation_norm", **_EXACT},
    "activation norm, refit on the dense stream": {"method": "activation_norm", "reconstruct": "dense", **_EXACT},
    "K-FAC, refit on the pruned stream": {**_BEST, **_EXACT},
    "K-FAC, refit on the pruned stream, vocabulary too": {**_BEST, **_BOTH, **_EXACT},
}
"""The ``prune`` section by name of the row; the budget is what brings the model to a peer's size."""
RUINED = 10.0
"""Perplexity over dense above which a peer's model is of no use, and secateur is not measured at its size."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured model, or why there is none.

    Attributes:
        name: of the row.
        options: what it was made with; a kept row with other options is measured again.
        size: parameters of the peer that it stands beside; for a peer its own, 0 where it failed.
        parameters: its own; 0 where it failed.
        seconds: to make it, from the start of the process or the run to the saved folder.
        reused: whether every pass over calibration text that it needs was done for an earlier row.
        reloads: "yes" with plain transformers, else what that said.
        score: on the test text; None where it failed.
        error: last line of what went wrong.
    """

    name: str
    options: Sequence[str] | Mapping[str, Any]
    size: int = 0
    parameters: int = 0
    seconds: float = 0.0
    reused: bool = False
    reloads: str = ""
    score: TextScore | None = field(default=None, repr=False)
    error: str = ""

    @property
    def measured_score(self) -> TextScore:
        """The score of a row that has one."""
        assert self.score is not None, f"{self.name} was not measured: {self.error}"
        return self.score


def parse_domain(text: str) -> tuple[str, CorpusSpec]:
    """Return name and corpus of ``NAME=PATH[::TEMPLATE]``, where PATH may be CALIBRATION,[VALIDATION,]TEST."""
    name, _, where = text.partition("=")
    paths, _, template = where.partition("::")
    splits = {
        1: ("path",),
        2: ("calibration", "test"),
        3: ("calibration", "validation", "test"),
    }
    files = paths.split(",")
    if len(files) not in splits:
        raise SystemExit(f"{text!r} names {len(files)} files; give one, or CALIBRATION,[VALIDATION,]TEST")
    template = template.replace("\\n", "\n")
    return name, CorpusSpec(**dict(zip(splits[len(files)], files, strict=True)), text=template or None)


# -- the peers' environment --------------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """Return the interpreter of the peers' environment, made on the first call.

    Raises:
        UnavailableError: it could not be made, or a package could not be had.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if installed(folder) == PACKAGES:
        return python
    wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
    steps: list[list[str]] = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *wanted],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(
                f"the peers' environment could not be made: {last_line(done.stderr)}. Check the connection."
            )
    # Not --system-site-packages, which shows the packages of the interpreter that this environment was made from.
    (packages(folder) / "libraries_beside.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


def packages(folder: Path) -> Path:
    """Return where an environment keeps its packages."""
    return next(iter(sorted(folder.glob("lib/python*/site-packages"))), folder / "Lib" / "site-packages")


def installed(folder: Path) -> dict[str, str]:
    """Return the versions of the peers in an environment."""
    found = {d.name.lower().replace("_", "-"): d.version for d in _distributions(packages(folder))}
    return {name: found[name] for name in PACKAGES if name in found}


def _distributions(folder: Path) -> Iterable[importlib.metadata.Distribution]:
    return importlib.metadata.distributions(path=[str(folder)])


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# -- rows --------------------------------------------------------------------------------------------------------------


class _Bench:
    def __init__(self, store: Path, name: str, corpus: CorpusSpec | None, sizes: tuple[int, int]) -> None:
        recipe = demo_recipe(prepare(), store / "unused")
        self.name, self.corpus = name, corpus or recipe.domain["medical"]
        self.calibration_tokens, self.test_tokens = sizes
        self.checkpoint = resolve_model(recipe.model)
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.home = store / "peers"
        self.store = self.home / f"{name}-{digest(self.corpus.model_dump(), recipe.model, *sizes)[:8]}"
        self.store.mkdir(parents=True, exist_ok=True)

    @cached_property
    def python(self) -> Path:
        return environment(self.home / "env")

    @cached_property
    def test_blocks(self) -> PackedBlocks:
        """The windows that every row is measured on; no document that any row could have calibrated on is in them."""
        seen = secateur.count_tokens(self.tokenizer, self.corpus).documents.tolist()
        return self.blocks("test", self.test_tokens, exclude=frozenset(seen))

    def blocks(self, split: Literal["calibration", "test"], tokens: int, exclude: frozenset[int]) -> PackedBlocks:
        return load_split(
            self.corpus,
            split,
            self.tokenizer,
            block_size=BLOCK_SIZE,
            max_tokens=tokens,
            exclude=exclude,
            name=self.name,
            keep_text=True,
        )

    @cached_property
    def texts(self) -> Path:
        """The documents that secateur calibrates on, for the peers."""
        file = self.store / "calibration.jsonl"
        texts = self.blocks("calibration", self.calibration_tokens, frozenset()).texts
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return file

    def kept(self, row: Row) -> Row | None:
        """Return the row as it was measured before, with the same options; ours never where it failed."""
        file = self._file(row)
        data = json.loads(file.read_text()) if file.is_file() else {}
        if data.get("options") != json.loads(json.dumps(row.options)) or (row.size and data["size"] != row.size):
            return None
        if row.name in SECATEUR and data["error"]:
            return None
        score = data.pop("score")
        if score:
            tuples = {key: tuple(score[key]) for key in ("document_nll", "document_tokens", "document_bytes")}
            score = TextScore(**{**score, **tuples})
        return Row(**data, score=score)

    def keep(self, row: Row) -> Row:
        write_json(self._file(row), asdict(row))
        result = f"perplexity {row.score.perplexity:.2f}" if row.score else row.error
        print(f"{row.name}: {row.parameters:,} parameters, {row.seconds:.0f} s, {result}", flush=True)
        return row

    def _file(self, row: Row) -> Path:
        size = f"-{row.size}" if row.name in SECATEUR else ""
        return self.store / f"{''.join(c if c.isalnum() else '_' for c in row.name)}{size}.json"

    def dense(self) -> Row:
        row = Row("dense", {})
        return self.kept(row) or self.keep(self.measured(row, self.checkpoint.folder))

    def peer(self, name: str) -> Row:
        row = Row(name, PEERS[name])
        return self.kept(row) or self.keep(self._run_peer(row))

    def ours(self, name: str, size: int, dense: int) -> Row:
        row = Row(name, SECATEUR[name], size=size)
        return self.kept(row) or self.keep(self._run_ours(row, 1 - size / dense))

    def _run_peer(self, row: Row) -> Row:
        output = self.store / "model"
        shutil.rmtree(output, ignore_errors=True)
        command = ["--model", self.checkpoint.folder, "--texts", self.texts, "--tokens", self.calibration_tokens]
        driver, *options = row.options
        seconds, _, error = self._process(DRIVERS / driver, *command, "--output", output, *options)
        row = replace(row, seconds=seconds, error=error)
        if not error:
            row = self.measured(row, output)
            row = replace(row, size=row.parameters)
        shutil.rmtree(output, ignore_errors=True)
        return row

    def _run_ours(self, row: Row, share: float) -> Row:
        recipe = {
            "model": str(self.checkpoint.folder),
            "domain": {self.name: self.corpus},
            "calibrate": {"max_tokens": self.calibration_tokens, "block_size": BLOCK_SIZE},
            "prune": {**SECATEUR[row.name], "budget": {"parameters": share}},
            "output": str(self.store / "run"),
        }
        calibrated, started = _calibrations(self.store / "run"), time.perf_counter()
        try:
            made = secateur.run(recipe, until="shrink")
        except SecateurError as error:
            return replace(row, error=str(error), seconds=time.perf_counter() - started)
        seconds = time.perf_counter() - started
        reused = calibrated == _calibrations(self.store / "run")
        assert made.model_folder is not None
        return self.measured(replace(row, seconds=seconds, reused=reused), made.model_folder)

    def measured(self, row: Row, folder: Path) -> Row:
        """Return the row with what a saved folder scores, loaded as anybody would load it."""
        _, _, refused = self._process(DRIVERS / "reload.py", folder)
        row = replace(row, reloads=refused or "yes")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            return replace(row, error=f"the saved folder does not load: {last_line(str(error))}")
        tokenizer, blocks = transformers.AutoTokenizer.from_pretrained(folder), self.test_blocks
        if len(tokenizer) != len(self.tokenizer):
            blocks = resegment(blocks, tokenizer)
        score = evaluate_text(model, blocks, family_of(model.config.model_type))
        return replace(row, parameters=sum(p.numel() for p in model.parameters()), score=score)

    def _process(self, *command: object) -> tuple[float, str, str]:
        """Run a script in the peers' environment; return its seconds, its output, and what went wrong, if anything."""
        own = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": ""}
        started = time.perf_counter()
        try:
            done = subprocess.run(
                [str(part) for part in (self.python, *command)],
                env={**os.environ, **own},
                capture_output=True,
                text=True,
                check=False,
                timeout=DRIVER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return float(DRIVER_SECONDS), "", f"not done after {DRIVER_SECONDS} seconds"
        error = last_line(done.stderr) if done.returncode else ""
        return time.perf_counter() - started, done.stdout, error


def _calibrations(run: Path) -> dict[str, Any]:
    """Return what a run folder records of the passes over calibration text."""
    file = run / "manifest.json"
    stages = json.loads(file.read_text())["stages"] if file.is_file() else {}
    return {name: facts for name, facts in stages.items() if name.startswith(("calibrate:", "gram:"))}


# -- the table ---------------------------------------------------------------------------------------------------------


def _loss(score: TextScore, dense: TextScore) -> float:
    return paired_difference(score, dense).mean


def _ratio(first: TextScore, second: TextScore) -> str:
    """Return the perplexity of the first model over the second's, per token of the second, with its standard error."""
    difference = paired_difference(first, second)
    ratio = math.exp(min(difference.mean, 700.0))
    return with_error(ratio, ratio * difference.stderr) if difference.stderr else f"{ratio:.0f}"


def _byte_ratio(score: TextScore, dense: TextScore) -> str:
    difference = paired_bits_per_byte(score, dense)
    ratio = 1 + difference.mean / dense.bits_per_byte
    return with_error(ratio, difference.stderr / dense.bits_per_byte) if difference.stderr else f"{ratio:.0f}"


def _perplexity(score: TextScore, dense: TextScore) -> str:
    """Return the perplexity per token of the dense model, which is the usual one where the vocabulary is whole."""
    mean, stderr = ratio_estimate(score.document_nll, dense.document_tokens)
    perplexity = math.exp(min(mean, 700.0))
    return with_error(perplexity, perplexity * stderr)


def _reloads(row: Row) -> str:
    return "with secateur" if row.name in SECATEUR and row.reloads != "yes" else row.reloads


def _label(row: Row) -> str:
    return f"**secateur**: {row.name}" if row.name in SECATEUR else row.name


def _line(row: Row, dense: TextScore, best: Mapping[int, Row]) -> str:
    peer = best.get(row.size)
    beside = "" if peer is None else _ratio(row.measured_score, peer.measured_score)
    cells = [
        _label(row),
        f"{row.parameters:,}",
        _perplexity(row.measured_score, dense),
        _ratio(row.measured_score, dense),
        _byte_ratio(row.measured_score, dense),
        _reloads(row),
        f"{row.seconds:,.0f}{'*' * row.reused}" if row.seconds else "",
        "best peer" if row is peer else beside,
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as Markdown, the largest first, and below them those that failed."""
    dense = rows[0].measured_score
    measured = [row for row in rows if row.score]
    worst_first = sorted(measured, key=lambda row: -row.measured_score.nll_per_token)
    best = {row.size: row for row in worst_first if row.name in PEERS}
    order = sorted(measured, key=lambda row: (-(row.size or row.parameters), _loss(row.measured_score, dense)))
    columns = ["model", "parameters", "perplexity", "/ dense", "bits/byte / dense", "reloads", "seconds",
               "over the best peer at the same size"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---:|---:|---:|---|---:|---:|"]
    lines += [_line(row, dense, best) for row in order]
    failed = [f"- {_label(row)}{f' at {row.size:,}' if row.size else ''}: {row.error}" for row in rows if row.error]
    return [*lines, "", *(["Not measured:", "", *failed, ""] if failed else [])]


def _introduction(bench: _Bench, dense: TextScore) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in installed(bench.home / "env").items())
    return [
        f"### Peers at the same size, no training (SmolLM2-135M-Instruct, {bench.name})",
        "",
        f"{bench.calibration_tokens:,} calibration tokens, the same documents for every row that reads text (a quarter",
        "more, of validation text, goes into fitting a reconstruction; no peer fits one);",
        f"{dense.num_tokens:,} predicted test tokens of {dense.num_documents} documents. ± one standard error over",
        "documents, of ratios paired. Perplexity is per token of the dense model. *Reloads*: with plain transformers,",
        "where secateur is not installed. Seconds are from loading the model to the saved folder, for peers with the",
        "start of a process; * means that an earlier row had calibrated. Peers, at their authors' defaults but for",
        f"what the row names: {versions}.",
        "",
    ]


def measure_domain(store: Path, name: str, corpus: CorpusSpec | None, sizes: tuple[int, int], *, ours: bool) -> str:
    """Return one domain's table as Markdown."""
    bench = _Bench(store, name, corpus, sizes)
    dense = bench.dense()
    rows = [dense, *(bench.peer(peer) for peer in PEERS)]
    limit = dense.measured_score.nll_per_token + math.log(RUINED)
    useful = {row.size for row in rows if row.size and row.measured_score.nll_per_token < limit}
    targets = sorted(useful, reverse=True) if ours else []
    rows += [bench.ours(option, size, dense.parameters) for size in targets for option in SECATEUR]
    return "\n".join([*_introduction(bench, dense.measured_score), *table(rows)])


def measure(
    store: Path,
    domains: Sequence[str],
    sizes: tuple[int, int] = (CALIBRATION_TOKENS, TEST_TOKENS),
    *,
    ours: bool = True,
) -> str:
    """Return the tables as Markdown: of each domain, or of the demo's medical text where none is named."""
    named: list[tuple[str, CorpusSpec | None]] = [*map(parse_domain, domains)] or [("medical", None)]
    return "\n".join(measure_domain(store, name, corpus, sizes, ours=ours) for name, corpus in named)


def main() -> None:
    """Measure and print; the page of all benchmarks is left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH[,[VALIDATION,]TEST][::TEMPLATE]")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--test-tokens", type=int, default=TEST_TOKENS)
    parser.add_argument("--rows", choices=["all", "peers"], default="all")
    options = parser.parse_args()
    store = Path(__file__).resolve().parent.parent / "runs" / "bench"
    sizes = options.calibration_tokens, options.test_tokens
    transformers.utils.logging.disable_progress_bar()
    print(measure(store, options.domain, sizes, ours=options.rows == "all"))


if __name__ == "__main__":
    main()
