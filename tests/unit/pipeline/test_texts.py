"""The text that decides about sizes is as much as the test text, and is not the text that judged the fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.pipeline.texts import Texts
from secateur.recipe import parse_recipe
from secateur.store.checkpoints import load_tokenizer, resolve_model
from tests.pico import Pico, build_pico


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A model folder, a domain corpus and a general text; nobody changes them."""
    return build_pico(tmp_path_factory.mktemp("pico"))


def _texts(pico: Pico, folder: Path, reconstruct: str, test_tokens: int | None) -> Texts:
    recipe = pico.recipe(folder, prune={"reconstruct": reconstruct}, evaluate={"max_tokens": test_tokens})
    checkpoint = resolve_model(recipe["model"])
    return Texts(
        parse_recipe(recipe), checkpoint, lambda: load_tokenizer(checkpoint), lambda _: (), frozenset, keep_text=True
    )


@pytest.mark.parametrize("reconstruct", ["none", "dense", "pruned"])
def test_sizes_are_judged_on_as_much_text_as_is_tested(pico: Pico, tmp_path: Path, reconstruct: str) -> None:
    """It is read once, is validation text, and none of it judged a fit."""
    texts = _texts(pico, tmp_path, reconstruct, 1024)
    sizing = texts.sizing("medical")
    assert sizing is texts.sizing("medical")
    assert sizing.split == "validation"
    assert 0.9 * 1024 < sizing.num_tokens <= 1024
    judged = set(texts.split("medical", "validation").documents.tolist())
    assert reconstruct == "none" or not judged & set(sizing.documents.tolist())
    assert len(sizing.texts) == len(sizing.documents)  # another tokenizer can read it


def test_without_a_limit_all_validation_text_is_used(pico: Pico, tmp_path: Path) -> None:
    """As all test text is."""
    sizing = _texts(pico, tmp_path, "none", None).sizing("medical")
    assert sizing.num_tokens > _texts(pico, tmp_path, "none", 1024).sizing("medical").num_tokens
