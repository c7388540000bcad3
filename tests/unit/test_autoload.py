"""``import secateur`` alone makes transformers know our model types, and costs nothing until one is asked for."""

from __future__ import annotations

import sys

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur import autoload
from secateur.families.loader import UNEVEN_PREFIX
from tests.command import fresh_python


def test_the_offer_costs_nothing_until_it_is_taken() -> None:
    """In a fresh interpreter neither library is loaded; after transformers' registry is, no model code of ours is."""
    code = """
import sys
import secateur
assert not {"torch", "transformers"} & set(sys.modules), "import secateur is not light"
waiting = [finder for finder in sys.meta_path if type(finder).__module__ == "secateur.autoload"]
assert len(waiting) == 1
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "secateur.store.modeling" not in sys.modules, "our classes were made although nobody asked"
assert "llama" in CONFIG_MAPPING and "nothing_like_it" not in CONFIG_MAPPING
assert "secateur.store.modeling" not in sys.modules
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "secateur.autoload"]
import importlib.util, inspect, transformers.models.auto.configuration_auto as awaited
assert importlib.util.find_spec(awaited.__name__).origin == awaited.__file__
assert "CONFIG_MAPPING" in inspect.getsource(awaited)
"""
    answer = fresh_python("-c", code)
    assert answer.code == 0, answer.err


def test_every_uneven_type_is_known_to_transformers() -> None:
    """Each supported model type has its uneven sibling; other names that begin like ours stay unknown."""
    from secateur.families.loader import families

    for family in families().values():
        for model_type in family.model_types:
            assert CONFIG_MAPPING[UNEVEN_PREFIX + model_type].model_type == UNEVEN_PREFIX + model_type
    assert UNEVEN_PREFIX + "bert" not in CONFIG_MAPPING
    with pytest.raises(KeyError):
        CONFIG_MAPPING[UNEVEN_PREFIX + "bert"]


def test_installing_twice_changes_nothing() -> None:
    """A second import, as after a reload, neither wraps the registry again nor leaves a waiter."""
    before, finders = CONFIG_MAPPING._extra_content, list(sys.meta_path)
    autoload.install()
    assert CONFIG_MAPPING._extra_content is before
    assert sys.meta_path == finders
    assert autoload._PREFIX == UNEVEN_PREFIX
