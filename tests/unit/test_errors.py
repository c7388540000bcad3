"""The exception tree: one base, drawn as it is."""

from __future__ import annotations

import inspect

from secateur import errors


def test_every_error_has_one_base_and_is_in_the_drawing() -> None:
    """Catching SecateurError catches all of them, and the module's drawing names each."""
    classes = [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]
    assert len(classes) > 5
    for item in classes:
        assert issubclass(item, errors.SecateurError)
        assert item.__name__ in (errors.__doc__ or "")
        assert item.__doc__
