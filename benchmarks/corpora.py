"""What a large corpus takes to read: peak memory, seconds and documents per second by the number of documents.

    OMP_NUM_THREADS=1 python benchmarks/corpora.py [--documents 10000 100000 1000000] [--way sample whole count]

Short generated documents stand in one JSON lines file. Each row is a process of its own, which reads the calibration
split the way a job does (``load_split``; ``count_split_tokens`` for a vocabulary) with a tokenizer of one token per
word, goes through the blocks once as a job would, and reports the most resident memory above that before the first
document (Linux only).

sample: 32,768 tokens are taken, as for a calibration. whole: all tokens of the split. count: token ids are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from secateur.corpus import count_split_tokens, load_split
from secateur.recipe import CorpusSpec

WAYS = ("sample", "whole", "count")
SAMPLE_TOKENS = 32_768
BLOCK_SIZE = 512
BATCH_BLOCKS = 8
WORDS = ("leaf", "root", "branch", "prune", "shear", "graft", "soil", "bark", "sap", "bud", "stem", "twig")


def main() -> None:
    """Measure every number of documents in every way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child[0], Path(options.child[1]))))
        return
    print("| way | documents | text | tokens taken | seconds | documents/s | memory above the start |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.documents:
            file = Path(folder, f"{count}.jsonl")
            write_documents(file, count)
            for way in options.way:
                print(row(way, count, file), flush=True)
            file.unlink()


def write_documents(file: Path, count: int) -> None:
    """Write so many different documents of about 24 words; one in a hundred is a copy of the one before it."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        line = ""
        for number in range(count):
            if number % 100 != 99:
                line = json.dumps({"text": f"{number} " + " ".join(draw.choices(WORDS, k=24))}) + "\n"
            stream.write(line)


def row(way: str, count: int, file: Path) -> str:
    """Return the table's row of one measurement, made in a process of its own."""
    command = [sys.executable, __file__, "--child", way, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    return (
        f"| {way} | {count:,} | {file.stat().st_size / 1e6:,.1f} MB | {found['tokens']:,} | {found['seconds']:.1f} | "
        f"{count / found['seconds']:,.0f} | {(found['peak'] - found['start']) / 1e6:,.0f} MB |"
    )


def measured(way: str, file: Path) -> dict[str, Any]:
    """Read a corpus one way; return tokens, seconds, and the most resident bytes before and after."""
    tokenizer, spec = word_tokenizer(), CorpusSpec(path=str(file))
    few = [f"a few words {number}" for number in range(400)]
    load_split(few, "calibration", tokenizer, block_size=64, max_tokens=64)  # so that all is imported
    start, started = most_resident(), time.perf_counter()
    if way == "count":
        tokens = count_split_tokens(spec, "calibration", tokenizer, num_ids=len(tokenizer)).num_tokens
    else:
        limit = SAMPLE_TOKENS if way == "sample" else None
        blocks = load_split(spec, "calibration", tokenizer, block_size=BLOCK_SIZE, max_tokens=limit)
        tokens = sum(int(batch.valid.sum()) for batch in blocks.batches(BATCH_BLOCKS))
        assert tokens == blocks.num_tokens
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "start": start, "peak": most_resident()}


def word_tokenizer() -> Any:
    """Return a tokenizer with one token per word of the documents; each number is the same one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<number>": 0, **{w: n for n, w in enumerate(WORDS, start=1)}}, "<number>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<number>")


def most_resident() -> int:
    """Return the most resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
