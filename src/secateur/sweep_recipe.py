"""The sweep file: a recipe with a section ``sweep`` that says what is varied. Nothing here touches models or text.

A grid gives every combination of its values, and points stand for themselves. Each has a name that follows from what
it changes alone, so that it is found again when the grid grows.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import ConfigError
from secateur.recipe import Recipe, parse_recipe, read_recipe_data
from secateur.registry import unknown_name

PRESETS: Mapping[str, Sequence[Mapping[str, float]]] = {
    "thresholds": [{"threshold": value} for value in (1e-4, 1e-3, 1e-2, 1e-1)],
    "channels": [{"channels": value} for value in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "parameters": [{"parameters": value} for value in (0.1, 0.2, 0.3, 0.4)],
}
"""Lists of budgets by name, for ``prune.budget`` in a grid; the range of thresholds is that of the Mini-GPTs paper
(2312.12682), whose two are the second and the last."""

MOST_POINTS = 1000
"""More than this is taken for a slip in the grid."""

_LONGEST_NAME = 80


def _parse_values(values: object) -> object:
    return [values] if isinstance(values, str) else values


Values = Annotated[list[Any], Field(min_length=1), BeforeValidator(_parse_values)]


class SweepSpec(BaseModel):
    """What is varied, and which models stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid: dict[str, Values] = {}
    points: list[Annotated[dict[str, Any], Field(min_length=1)]] = []
    keep_models: bool | Literal["front"] = False

    @model_validator(mode="after")
    def _something_varies(self) -> SweepSpec:
        if not self.grid and not self.points:
            raise ValueError("give a grid, such as {prune.budget: channels}, or a list of points")
        return self


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep.

    Attributes:
        name: of its folder.
        overrides: dotted recipe keys and their values.
    """

    name: str
    overrides: Mapping[str, Any]


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[Recipe, SweepSpec]:
    """Return what all points of a sweep file have in common, and what is varied.

    Args:
        path: the YAML file.
        overrides: dotted recipe keys that win over the file's, but not over what is varied.

    Raises:
        ConfigError: the file is missing, is not YAML, or is no recipe with a ``sweep`` section.
    """
    data = read_recipe_data(path, overrides)
    return parse_sweep(data, source=f"sweep {path}")


def parse_sweep(data: object, *, source: str = "sweep") -> tuple[Recipe, SweepSpec]:
    """Return what all points of a sweep have in common, and what is varied.

    Args:
        data: what YAML gave: a mapping of recipe keys, and ``sweep``.
        source: where it came from, for messages.

    Raises:
        ConfigError: a key is unknown, missing or has an impossible value.
    """
    if not isinstance(data, Mapping) or "sweep" not in data:
        raise ConfigError(
            f"{source} has no section sweep, which says what is varied. Add one, such as "
            "sweep: {grid: {prune.budget: channels}}."
        )
    recipe = parse_recipe({key: value for key, value in data.items() if key != "sweep"}, source=source)
    if not isinstance(data["sweep"], Mapping):
        raise ConfigError(f"sweep must be a mapping of grid, points and keep_models; got {data['sweep']!r}.")
    try:
        return recipe, SweepSpec.model_validate(dict(data["sweep"]))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source} cannot be used:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(item: Any) -> str:
    where = ".".join(["sweep", *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return unknown_name("key at sweep:", item["loc"][-1], list(SweepSpec.model_fields))
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}"


def points_of(spec: SweepSpec) -> list[Point]:
    """Return the points of a sweep: the grid's, the last key varied first, and then the single ones.

    Raises:
        ConfigError: a preset is unknown, a point is there twice, or there are too many.
    """
    grid = {key: list(_expanded(key, values)) for key, values in spec.grid.items()}
    count = len(spec.points)
    if grid:
        size = 1
        for values in grid.values():
            size *= len(values)
        count += size
    if count > MOST_POINTS:
        raise ConfigError(f"the sweep has {count:,} points; at most {MOST_POINTS:,} are taken. Vary less at once.")
    asked: list[tuple[str | None, dict[str, Any]]] = []
    if grid:
        asked += [(None, dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    for point in spec.points:
        overrides = {key: value for key, value in point.items() if key != "name"}
        asked.append((None if point.get("name") is None else str(point["name"]), overrides))
    _require_different([overrides for _, overrides in asked])
    names = [name or _name(overrides) for name, overrides in asked]
    return [
        Point(_told_apart(name, overrides) if given is None and names.count(name) > 1 else name, overrides)
        for name, (given, overrides) in zip(names, asked, strict=True)
    ]


def chosen(points: Sequence[Point], patterns: Sequence[str]) -> list[Point]:
    """Return the points whose names match one of the patterns (``*`` and ``?`` as in file names); all without any.

    Raises:
        ConfigError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(point.name, pattern) for point in points):
            names = [point.name for point in points]
            raise ConfigError("no point matches: " + unknown_name("point", pattern, names))
    return [p for p in points if not patterns or any(fnmatch.fnmatchcase(p.name, pattern) for pattern in patterns)]


def _expanded(key: str, values: Sequence[Any]) -> Iterator[Any]:
    """Yield the values of a key; the name of a preset stands for its budgets."""
    for value in values:
        if key != "prune.budget" or not isinstance(value, str):
            yield value
        elif value in PRESETS:
            yield from PRESETS[value]
        else:
            raise ConfigError(f"sweep.grid.{key}: " + unknown_name("preset", value, list(PRESETS)))


def _require_different(points: Sequence[Mapping[str, Any]]) -> None:
    seen: set[str] = set()
    for overrides in points:
        text = _canonical(overrides)
        if text in seen:
            raise ConfigError(f"sweep: the point {text} is there twice. Remove one of them.")
        seen.add(text)


def _canonical(overrides: Mapping[str, Any]) -> str:
    return json.dumps(overrides, sort_keys=True, ensure_ascii=False, default=str)


def _name(overrides: Mapping[str, Any]) -> str:
    """Return a name for a folder that says what is changed, such as ``wanda-channels_0.2-no_recover``."""
    parts = [_part(key.rpartition(".")[2], value) for key, value in overrides.items()]
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(parts)).strip("_.+-")
    return name if name and len(name) <= _LONGEST_NAME else _told_apart(name[:_LONGEST_NAME].strip("_.+-"), overrides)


def _part(key: str, value: Any) -> str:
    if key == "method" and isinstance(value, str):
        return value
    if key == "budget" and isinstance(value, Mapping):
        return "+".join(_part(inner, share) for inner, share in value.items())
    if value is None:
        return f"no_{key}"
    if isinstance(value, Mapping):
        return "+".join([key, *(_part(inner, item) for inner, item in value.items())])
    if isinstance(value, list):
        return "+".join([key, *map(str, value)])
    return f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"


def _told_apart(name: str, overrides: Mapping[str, Any]) -> str:
    mark = hashlib.blake2b(_canonical(overrides).encode(), digest_size=4).hexdigest()
    return f"{name or 'point'}-{mark}"
