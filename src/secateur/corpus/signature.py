"""A cheap answer to "is this still the same text?", without reading it."""

from __future__ import annotations

from secateur.corpus.files import source_files
from secateur.corpus.formats import FORMATS
from secateur.recipe import CorpusSpec


def source_signature(spec: CorpusSpec) -> list[tuple[str, int, int]]:
    """Return (path, size in bytes, modification time in ns) of every file behind a corpus.

    A hub data set has no files here; its name in the recipe is all there is.
    """
    signature = []
    for paths in (spec.path, spec.calibration, spec.validation, spec.test):
        for file in source_files(paths, FORMATS) if paths else ():
            stat = file.stat()
            signature.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    return signature
