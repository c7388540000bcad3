"""Limits that several commands take."""

from __future__ import annotations


def seconds_of(text: str | None, option: str = "--max-time") -> float | None:
    """Return the seconds that a time such as ``30m`` says; None where there is none.

    Raises:
        ConfigError: it cannot be read; the message names the option.
    """
    from secateur.errors import ConfigError
    from secateur.recipe import parse_seconds

    if text is None:
        return None
    try:
        value = parse_seconds(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    assert isinstance(value, float)
    return value
