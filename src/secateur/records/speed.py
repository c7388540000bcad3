"""How large and how fast models are on one machine, measured in turn; plain numbers, imports without torch.

All models of a record ran in the same rounds, one right after the other, so that a ratio is taken within a round and
what slowed the machine down for a while slowed both. The first model is the one that all others are compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What a model is asked to do in one run.

    Attributes:
        prompt_length: tokens of each prompt.
        batch_size: prompts that are read and continued together.
        new_tokens: tokens that follow each prompt; reading the prompt gives the first of them.
    """

    prompt_length: int
    batch_size: int
    new_tokens: int

    @property
    def words(self) -> str:
        """The setting in words, such as ``4 x 128 tokens``."""
        return f"{self.batch_size} x {self.prompt_length:,} tokens"

    @property
    def num_tokens(self) -> int:
        """Tokens that are in memory at the end, over the whole batch."""
        return self.batch_size * (self.prompt_length + self.new_tokens)


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing: the middle one, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Timing:
    """One setting of one model, round by round.

    Attributes:
        setting: what was done.
        first_token_s: per round, seconds from the token ids of the prompts to the first new token of each.
        decode_s: per round, seconds for all further new tokens, one step after another.
        peak_bytes: the most memory that weights and run took together; None where it was not measured.
    """

    setting: Setting
    first_token_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def prefill_tokens_per_s(self) -> tuple[float, ...]:
        """Per round, tokens of prompts read per second, until the first new token is known."""
        tokens = self.setting.batch_size * self.setting.prompt_length
        return tuple(tokens / seconds for seconds in self.first_token_s)

    @property
    def decode_tokens_per_s(self) -> tuple[float, ...]:
        """Per round, new tokens per second over the whole batch, the first of each left out."""
        tokens = self.setting.batch_size * (self.setting.new_tokens - 1)
        return tuple(tokens / seconds for seconds in self.decode_s)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        """Return the timing that ``asdict`` wrote."""
        peak = data["peak_bytes"]
        return cls(
            Setting(**data["setting"]),
            tuple(map(float, data["first_token_s"])),
            tuple(map(float, data["decode_s"])),
            None if peak is None else int(peak),
        )


@dataclass(frozen=True, slots=True)
class KvCache:
    """What one sequence's keys and values take, at the dtype that the model computes in.

    Attributes:
        bytes_per_token: over all layers, while the text is shorter than every window.
        sliding_bytes_per_token: the part of it in layers that look back over a window only.
        num_sliding: those layers.
        window: tokens that such a layer sees, the newest included; None where there is no such layer.
    """

    bytes_per_token: int
    sliding_bytes_per_token: int = 0
    num_sliding: int = 0
    window: int | None = None

    def bytes_at(self, num_tokens: int) -> int:
        """Return what a text of so many tokens takes; layers with a window keep what the next token can see."""
        kept = num_tokens if self.window is None else min(num_tokens, self.window - 1)
        lasting = self.bytes_per_token - self.sliding_bytes_per_token
        return lasting * num_tokens + self.sliding_bytes_per_token * kept


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """One model: how large it is, and how fast.

    Attributes:
        name: of its row.
        parameters: by part of the model, tied ones once.
        disk_bytes: of its weight files; None where it was never on disk.
        memory_bytes: of its parameters in memory, by dtype, tied ones once.
        kv_cache: of one sequence.
        timings: one per setting, in the same order for all models.
        text_bytes_per_token: UTF-8 bytes of the prompts' text per token of its tokenizer; None where the prompts were
            drawn ids.
    """

    name: str
    parameters: Mapping[str, int]
    disk_bytes: int | None
    memory_bytes: Mapping[str, int]
    kv_cache: KvCache
    timings: tuple[Timing, ...]
    text_bytes_per_token: float | None = None

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def total_memory_bytes(self) -> int:
        """Weights in memory, all dtypes together."""
        return sum(self.memory_bytes.values())

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that any setting took; None where none was measured."""
        return max((timing.peak_bytes for timing in self.timings if timing.peak_bytes is not None), default=None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpeed:
        """Return the row that ``asdict`` wrote."""
        return cls(
            **{
                **data,
                "kv_cache": KvCache(**data["kv_cache"]),
                "timings": tuple(Timing.from_dict(timing) for timing in data["timings"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """What the numbers were measured on; they say little about another machine.

    Attributes:
        processor: the CPU's name.
        cores: that this process may use.
        threads: that torch computes with.
        device: where the models ran: "cpu", or the name of the accelerator.
        torch: its version.
        transformers: its version.
        dtype: that the models computed in.
    """

    processor: str
    cores: int
    threads: int
    device: str
    torch: str
    transformers: str
    dtype: str

    @property
    def words(self) -> str:
        """One line, such as ``EPYC 7763, 2 cores, 1 thread, float32, torch 2.9.0, transformers 5.0.0``."""
        place = self.processor if self.device == "cpu" else f"{self.device} beside {self.processor}"
        counts = f"{_count(self.cores, 'core')}, {_count(self.threads, 'thread')}"
        return f"{place}, {counts}, {self.dtype}, torch {self.torch}, transformers {self.transformers}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    """Models measured in turn.

    Attributes:
        models: by name; the first is what the others are compared with.
        machine: where it was.
        rounds: how often each model ran each setting, one model right after the other.
        peak_meaning: what the peaks of memory are, in words; empty where none were measured.
        load: processes that wanted to compute in the minute before, on average; None where the system does not tell.
    """

    models: Mapping[str, ModelSpeed]
    machine: Machine
    rounds: int
    peak_meaning: str = ""
    load: float | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def reference(self) -> ModelSpeed:
        """The model that all others are compared with."""
        return next(iter(self.models.values()))

    @property
    def others(self) -> list[ModelSpeed]:
        """All models but the reference."""
        return list(self.models.values())[1:]

    @property
    def was_busy(self) -> bool:
        """Whether more wanted to compute before than there are cores: others then were in the way."""
        return self.load is not None and self.load > self.machine.cores + 0.5

    @property
    def settings(self) -> list[Setting]:
        """What every model did, in order."""
        return [timing.setting for timing in self.reference.timings]

    def prefill_ratio(self, name: str, place: int) -> Spread:
        """Return how many times as fast as the reference a model reads prompts, over the rounds of a setting."""
        return self._ratio(name, place, lambda timing: timing.prefill_tokens_per_s)

    def decode_ratio(self, name: str, place: int) -> Spread:
        """Return how many times as fast as the reference a model adds tokens, over the rounds of a setting."""
        return self._ratio(name, place, lambda timing: timing.decode_tokens_per_s)

    def _ratio(self, name: str, place: int, speeds: Callable[[Timing], Sequence[float]]) -> Spread:
        ours, reference = self.models[name].timings[place], self.reference.timings[place]
        return Spread.of([a / b for a, b in zip(speeds(ours), speeds(reference), strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with every round."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpeedComparison:
        """Return the comparison that ``to_dict`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not such data, or of another version.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        models = {name: ModelSpeed.from_dict(model) for name, model in data["models"].items()}
        if not models:
            raise ValueError("it holds no models")
        return cls(models, Machine(**data["machine"]), int(data["rounds"]), data["peak_meaning"], data["load"])
