"""How large and how fast models are, as tables and sentences: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.records.speed import ModelSpeed, Setting, SpeedComparison, Spread
from secateur.records.units import PARTS
from secateur.report.tables import Table, format_bytes

_HOW = (
    "Speeds are of this machine: {machine}. Every model ran every setting {rounds} in turn, the likeliest token each "
    "time; a number is the median of the rounds, with the slowest and the fastest. Ratios are taken within a round."
)
_FIRST_TOKEN = "The time to the first token is that of reading the prompt."


def footprint_table(speed: SpeedComparison) -> Table:
    """Return what models take: parameters by part, weights, cache and memory, in columns of models.

    Behind every model but the first stands its share of the first one's.
    """
    columns = ["what it takes", speed.reference.name]
    for model in speed.others:
        columns += [model.name, f"of {speed.reference.name}"]
    rows = [
        [what, _amount(sizes[0], is_count), *(cell for size in sizes[1:] for cell in _beside(size, sizes[0], is_count))]
        for what, sizes, is_count in _sizes(speed)
        if any(size is not None for size in sizes)
    ]
    return Table("size", columns, rows)


def _beside(size: int | None, reference: int | None, is_count: bool) -> list[str]:
    share = f"{size / reference:.1%}" if size is not None and reference else ""
    return [_amount(size, is_count), share]


def _amount(size: int | None, is_count: bool) -> str:
    if size is None:
        return ""
    return f"{size:,}" if is_count else format_bytes(size)


def _sizes(speed: SpeedComparison) -> Iterator[tuple[str, list[int | None], bool]]:
    """Yield what is measured, its size in every model, and whether it is a number of parameters rather than bytes."""
    models = list(speed.models.values())
    yield "parameters", [model.total_parameters for model in models], True
    for part in PARTS:
        if any(model.parameters.get(part) for model in models):
            yield f"parameters: {part}", [model.parameters.get(part, 0) for model in models], True
    yield "weights on disk", [model.disk_bytes for model in models], False
    for dtype in dict.fromkeys(name for model in models for name in model.memory_bytes):
        sizes: list[int | None] = [model.memory_bytes.get(dtype, 0) for model in models]
        yield f"weights in memory ({dtype})", sizes, False
    yield "KV cache per token", [model.kv_cache.bytes_per_token for model in models], False
    longest = longest_text(speed)
    if any(model.kv_cache.num_sliding for model in models):
        yield f"KV cache of {longest:,} tokens", [model.kv_cache.bytes_at(longest) for model in models], False
    for place, setting in enumerate(speed.settings):
        peaks = [model.timings[place].peak_bytes for model in models]
        yield f"peak memory ({setting.words})", list(peaks), False


def longest_text(speed: SpeedComparison) -> int:
    """Return the tokens of the longest text that was measured, with what was added to the prompt."""
    return max(setting.prompt_length + setting.new_tokens for setting in speed.settings)


def timings_table(speed: SpeedComparison) -> Table:
    """Return how fast every model does every setting, and how many times as fast as the first one."""
    beside = f"/ {speed.reference.name}"
    columns = ["prompts", "model", "first token (ms)", "prefill tokens/s", beside, "decode tokens/s", beside]
    rows = []
    for place, setting in enumerate(speed.settings):
        for model in speed.models.values():
            timing, is_reference = model.timings[place], model is speed.reference
            rows.append(
                [
                    setting.words,
                    model.name,
                    spread_words(Spread.of([1000 * seconds for seconds in timing.first_token_s])),
                    spread_words(Spread.of(timing.prefill_tokens_per_s)),
                    "1" if is_reference else ratio_words(speed.prefill_ratio(model.name, place)),
                    spread_words(Spread.of(timing.decode_tokens_per_s)),
                    "1" if is_reference else ratio_words(speed.decode_ratio(model.name, place)),
                ]
            )
    return Table("speed on this machine (median, slowest to fastest round)", columns, rows)


def spread_words(spread: Spread) -> str:
    """Return for example ``1,234 (1,100 to 1,300)``."""
    digits = _digits(spread.median)
    return f"{spread.median:,.{digits}f} ({spread.low:,.{digits}f} to {spread.high:,.{digits}f})"


def speed_words(tokens_per_s: float) -> str:
    """Return for example ``1,234``, ``56.7`` or ``4.20``."""
    return f"{tokens_per_s:,.{_digits(tokens_per_s)}f}"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def ratio_words(spread: Spread) -> str:
    """Return for example ``1.23 (1.20 to 1.31)``."""
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def describe_measurement(speed: SpeedComparison) -> list[str]:
    """Return a paragraph on how speeds were measured and on what, and one on each thing to mind when reading them."""
    rounds = "once" if speed.rounds == 1 else f"{speed.rounds} times"
    new_tokens = speed.settings[0].new_tokens
    after = f"Decoding is of the {new_tokens - 1:,} {'token' if new_tokens == 2 else 'tokens'} after it."
    told = [" ".join([_HOW.format(machine=speed.machine.words, rounds=rounds), _FIRST_TOKEN, after])]
    if speed.peak_meaning:
        told.append(f"Peak memory: {speed.peak_meaning}.")
    if speed.was_busy:
        told.append(
            f"The machine was busy (a load of {speed.load:.1f} on {speed.machine.cores} cores when this began): "
            "believe ratios rather than tokens per second, and measure again on a quiet one."
        )
    return [*told, *_windows(speed), *_segmentation(speed)]


def _windows(speed: SpeedComparison) -> Iterator[str]:
    for model in speed.models.values():
        cache = model.kv_cache
        if cache.window is not None:
            yield (
                f"In {cache.num_sliding} {'layer' if cache.num_sliding == 1 else 'layers'} of {model.name} the cache "
                f"stops growing at {cache.window - 1:,} tokens."
            )


def _segmentation(speed: SpeedComparison) -> Iterator[str]:
    """Yield what tokens of another tokenizer mean: more of them may be needed for the same text."""
    reference = speed.reference.text_bytes_per_token
    for model in speed.others:
        if reference and model.text_bytes_per_token and model.text_bytes_per_token != reference:
            more = reference / model.text_bytes_per_token - 1
            yield (
                f"Tokens are each model's own: for the same text {model.name} needs {abs(more):.1%} "
                f"{'more' if more > 0 else 'fewer'} of them than {speed.reference.name}, so its speed in text is that "
                f"much {'lower' if more > 0 else 'higher'} than its tokens per second say."
            )


def describe_speed(speed: SpeedComparison) -> list[str]:
    """Return per model but the first how much faster it is, over all settings; and where that cannot be told apart."""
    sentences = []
    for model in speed.others:
        decode = [speed.decode_ratio(model.name, place) for place in range(len(speed.settings))]
        prefill = [speed.prefill_ratio(model.name, place) for place in range(len(speed.settings))]
        cache = _share(model, speed)
        sentences.append(
            f"Beside {speed.reference.name}, {model.name} reads prompts {_range(prefill)} as fast and adds tokens "
            f"{_range(decode)} as fast; its weights take "
            f"{model.total_memory_bytes / speed.reference.total_memory_bytes:.1%} of the memory{cache}."
        )
        if unclear := _unclear(speed.settings, prefill, decode):
            sentences.append(f"Some rounds say faster and others slower, so no difference is shown, for {unclear}.")
    return sentences


def _share(model: ModelSpeed, speed: SpeedComparison) -> str:
    reference = speed.reference.kv_cache.bytes_per_token
    return f", its KV cache {model.kv_cache.bytes_per_token / reference:.1%}" if reference else ""


def _range(ratios: list[Spread]) -> str:
    low, high = min(one.median for one in ratios), max(one.median for one in ratios)
    return f"{low:.2f} times" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} times"


def _unclear(settings: list[Setting], prefill: list[Spread], decode: list[Spread]) -> str:
    """Return the settings at which rounds fall on both sides of 1."""
    named = []
    for what, ratios in (("reading prompts", prefill), ("adding tokens", decode)):
        places = [setting.words for setting, one in zip(settings, ratios, strict=True) if one.low < 1 < one.high]
        if places:
            named.append(what if len(places) == len(settings) else f"{what} at {', '.join(places)}")
    return " and for ".join(named)
