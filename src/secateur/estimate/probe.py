"""A look of about ten seconds at how fast this machine is: one decoder layer of the model's shapes with random weights.

The layer goes through the very functions that a run uses (calibration, Gram matrices, gradients), so what they cost
besides multiplications is in the rates. Each rate is operations as ``costs`` counts them over seconds, so predictions
count the same way. Rates are kept in the user's cache folder and serve where no probe is wanted.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibrate import collect, collect_gradients, collect_grams
from secateur.errors import CheckpointError, ExportError
from secateur.estimate import costs
from secateur.estimate.machine import existing, resident_bytes
from secateur.estimate.size import ModelSize, Site, measure
from secateur.evaluate.perplexity import log_totals
from secateur.families.geometry import build_geometry
from secateur.files import cache_folder
from secateur.recipe import Recipe
from secateur.records.blocks import BlockBatch
from secateur.records.estimate import Rates
from secateur.recover.losses import distillation_loss, next_token_loss
from secateur.score import METHODS
from secateur.shrink.reconstruct import choose_reconstruction
from secateur.store.artifacts import read_json, write_json
from secateur.stream.forward import run_backbone

ASSUMED = Rates(
    forward=35e9,
    calibrate=32e9,
    head=35e9,
    gram=40e9,
    gradients=30e9,
    training=45e9,
    training_head=30e9,
    optimizer=2e8,
    solve=15e9,
    decode=5e9,
    read=1e9,
    write=4e8,
    load=1e9,
    tokenize=4e6,
    start_s=8.0,
    baseline_bytes=450_000_000,
)
"""Of one processor thread of a server of 2023, float32, to be used only where nothing was measured."""

_VOCAB = 512
"""Token ids of the probed layer's model; its head is timed apart."""
_MOST_COLUMNS = 16_384
_MOST_ROWS = 1024
_MOST_WIDTH = 1024
_FILE_BYTES = 32_000_000
_SHARE_S = 0.5
"""Seconds for each rate."""
_MOST_OF_MEMORY = 0.25
"""Of the free memory, that the probed layer may take."""

Clock = Callable[[], float]


@dataclass
class _Blocks:
    """Random tokens as packed text."""

    blocks: int
    size: int
    fingerprint: str = "probe"

    def __post_init__(self) -> None:
        self.documents = torch.arange(self.blocks)
        self.num_tokens = self.blocks * self.size
        self.num_blocks = self.blocks

    def batches(self, batch_size: int) -> Iterator[BlockBatch]:
        """Yield the blocks; every block is two documents."""
        generator = torch.Generator().manual_seed(0)
        for first in range(0, self.blocks, batch_size):
            rows = min(batch_size, self.blocks - first)
            half = max(self.size // 2, 1)
            positions = torch.arange(self.size) % half
            predicted = torch.ones(rows, self.size, dtype=torch.bool)
            predicted[:, positions == 0] = False
            yield BlockBatch(
                input_ids=torch.randint(3, _VOCAB, (rows, self.size), generator=generator),
                position_ids=positions.repeat(rows, 1),
                valid=torch.ones(rows, self.size, dtype=torch.bool),
                document=torch.arange(first, first + rows)[:, None].repeat(1, self.size),
                predicted=predicted,
                piece_bytes=tuple((row, self.size) for row in range(first, first + rows)),
            )


@dataclass
class Probe:
    """Times the pieces of one recipe's work.

    Attributes:
        recipe: what is asked.
        size: of the dense model.
        device: that is computed on.
        dtype: that is computed in.
        narrow: dtype of a training's products.
        clock: seconds; of the processor, where other programs run beside it and are not to count.
        seconds: for each rate.
    """

    recipe: Recipe
    size: ModelSize
    device: torch.device
    dtype: torch.dtype
    narrow: torch.dtype
    clock: Clock = time.perf_counter
    seconds: float = _SHARE_S

    def run(self, start: Rates = ASSUMED) -> Rates:
        """Return what was measured; what the recipe does not need, or cannot be measured here, is taken from ``start``.

        Raises:
            CheckpointError: no layer of the model can be made from its configuration.
        """
        wall, used = time.perf_counter(), time.process_time()
        baseline = start.baseline_bytes
        found: dict[str, float] = {}
        if self._fits():
            model, one = self._one_layer()
            if self.device.type == "cpu" and resident_bytes():
                baseline = resident_bytes() - one.parameters * self.dtype.itemsize
            found |= self._layer_rates(model, one)
            del model
            gc.collect()
        found |= self._head_rates() | self._other_rates()
        spent = time.perf_counter() - wall
        share = min(1.0, (time.process_time() - used) / max(spent * torch.get_num_threads(), 1e-9))
        on_cpu = self.device.type == "cpu"
        return replace(
            start, **found, baseline_bytes=baseline, source="probe", share=round(share, 3) if on_cpu else 1.0
        )

    def _fits(self) -> bool:
        from secateur.estimate.machine import look

        layer = self.size.layers[len(self.size.layers) // 2]
        needed = layer.parameters * self.dtype.itemsize * (3 if self.recipe.recover is not None else 1)
        seen = look(Path.cwd(), self.device)
        return needed < _MOST_OF_MEMORY * (seen.gpu_free_bytes or seen.memory_free_bytes)

    def _one_layer(self) -> tuple[Any, ModelSize]:
        """Return a model with one layer of the dense model's shapes and few token ids, and its sizes."""
        from transformers import AutoConfig, AutoModelForCausalLM

        geometry = self.size.geometry
        middle = geometry.num_layers // 2
        config = _one_layer_config(self.size, middle)
        data = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
        try:
            full = AutoConfig.for_model(config["model_type"], **data)
            model = AutoModelForCausalLM.from_config(full, dtype=self.dtype).to(self.device).eval()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"no single layer of {geometry.family.name} can be made to be timed: {error}. Use --no-probe."
            ) from None
        plain = model.config.to_dict()
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return model, measure(build_geometry(geometry.family, plain), plain, shapes, self.size.stored)

    def _layer_rates(self, model: Any, one: ModelSize) -> dict[str, float]:
        recipe, block = self.recipe, self.recipe.calibrate.block_size
        batch = recipe.calibrate.batch_size
        blocks, single = _Blocks(batch, block), _Blocks(1, block)
        family, geometry = one.geometry.family, one.geometry
        tokens = blocks.num_tokens
        flops = costs.layers_flops(one, tokens, block)

        def forward() -> None:
            with torch.inference_mode():
                for part in blocks.batches(batch):
                    run_backbone(model, part, family)

        plain = self._time(forward)
        found = {"forward": flops / plain}
        found["calibrate"] = flops / self._time(lambda: collect(model, blocks, geometry, batch_size=batch))
        prune = recipe.prune
        kinds, method = prune.width_kinds(), METHODS[prune.method]
        sites = one.sites(kinds)
        if sites and (prune.reconstruct != "none" or method.reads_grams(prune.options)):
            summed = self._time(lambda: collect_grams(model, blocks, geometry, kinds, batch_size=batch)) - plain
            found["gram"] = costs.gram_flops(sites, tokens) / max(summed, plain / 50)
        if kinds and method.reads_gradients(prune.options):
            flops = costs.gradient_flops(one, block, block)
            outputs, sketch = (
                method.reads_output_gradients(prune.options),
                method.reads_gradient_sketches(prune.options),
            )
            found["gradients"] = flops / self._time(
                lambda: collect_gradients(model, single, geometry, kinds, outputs=outputs, sketch=sketch)
            )
        if recipe.recover is not None:
            found |= self._training_rate(model.float(), one)
        return found

    def _training_rate(self, model: Any, one: ModelSize) -> dict[str, float]:
        spec = self.recipe.recover
        assert spec is not None, "only called where something is trained"
        block = self.recipe.calibrate.block_size
        blocks = _Blocks(spec.batch_size, block)
        (batch,) = blocks.batches(spec.batch_size)
        narrow = self.narrow != torch.float32
        parameters = [p.requires_grad_(True) for p in model.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=self.device.type in ("cpu", "cuda"))

        def step() -> None:
            with torch.autocast(self.device.type, self.narrow, enabled=narrow):
                hidden = run_backbone(model, batch, one.geometry.family)
            hidden.float().square().mean().backward()  # type: ignore[no-untyped-call]

        rate = costs.gradient_flops(one, blocks.num_tokens, block) / self._time(step)
        return {"training": rate, "optimizer": one.parameters / self._time(lambda: optimizer.step())}

    def _head_rates(self) -> dict[str, float]:
        """Return how fast the output head is, on as many token ids as are quickly tried."""
        hidden, columns = self.size.hidden, min(self.size.vocab, _MOST_COLUMNS)
        rows = min(self.recipe.calibrate.block_size * self.recipe.evaluate.batch_size, _MOST_ROWS)
        weight = torch.randn(columns, hidden, device=self.device, dtype=self.dtype) / hidden**0.5
        states = torch.randn(rows, hidden, device=self.device, dtype=self.dtype)
        flops = 2.0 * rows * hidden * columns

        def head() -> None:
            with torch.inference_mode():
                log_totals(nn.functional.linear(states, weight))

        found = {"head": flops / self._time(head)}
        if self.recipe.recover is not None:
            found["training_head"] = self._training_head(states.float(), weight.float(), flops)
        return found

    def _training_head(self, states: Tensor, weight: Tensor, flops: float) -> float:
        spec = self.recipe.recover
        assert spec is not None, "only called where something is trained"
        states, weight = states.requires_grad_(True), weight.requires_grad_(True)
        wanted = torch.ones(1, len(states), dtype=torch.bool, device=self.device)
        targets = torch.zeros(1, len(states), dtype=torch.int64, device=self.device)
        taught = spec.method == "distill" and bool(spec.distill.logits_weight)
        narrow = self.narrow != torch.float32

        def step() -> None:
            with torch.autocast(self.device.type, self.narrow, enabled=narrow):
                logits = nn.functional.linear(states, weight)[None]
                teacher = nn.functional.linear(states.detach(), weight.detach())[None] if taught else None
                loss = (
                    next_token_loss(logits, targets, wanted)
                    if teacher is None
                    else distillation_loss(logits, teacher, wanted)
                )
            loss.backward()  # type: ignore[no-untyped-call]

        return (3 + taught) * flops / self._time(step)

    def _other_rates(self) -> dict[str, float]:
        """Return rates of what is no model: least squares, decoding's way through weights, loading, the disk."""
        found: dict[str, float] = {}
        prune = self.recipe.prune
        sites = self.size.sites(prune.width_kinds())
        if sites and (prune.reconstruct != "none" or METHODS[prune.method].reads_grams(prune.options)):
            found["solve"] = self._solve_rate(min(max(site.width for site in sites), _MOST_WIDTH))
        weight = torch.randn(4096, 2048, device=self.device, dtype=self.dtype)
        row = torch.randn(1, 2048, device=self.device, dtype=self.dtype)
        found["decode"] = weight.nbytes / self._time(lambda: nn.functional.linear(row, weight), part=0.3)
        found |= self._disk_rates()
        stored = torch.randn(2_000_000, device=self.device).to(torch.bfloat16)

        def load() -> None:
            bool(torch.isfinite(stored.to(torch.float32)).all())

        found["load"] = 4 * len(stored) / self._time(load, part=0.3)
        return found

    def _solve_rate(self, width: int) -> float:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2 * width, width, generator=generator).to(self.device)
        gram, weight = rows.T @ rows / len(rows), torch.randn(min(self.size.hidden, width), width, device=self.device)
        keep = torch.arange(round(0.8 * width))
        site = Site(0, "", width, len(weight))
        return costs.fit_flops([site], 0.8) / self._time(lambda: choose_reconstruction(weight, gram, gram, keep))

    def _disk_rates(self) -> dict[str, float]:
        place = existing(Path(self.recipe.output)) / f".secateur-probe-{os.getpid()}"
        data = os.urandom(1_000_000) * (_FILE_BYTES // 1_000_000)
        try:
            started = time.perf_counter()
            with place.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written = time.perf_counter() - started
            started = time.perf_counter()
            place.read_bytes()
            return {"write": len(data) / written, "read": len(data) / (time.perf_counter() - started)}
        except OSError:
            return {}
        finally:
            place.unlink(missing_ok=True)

    def _time(self, work: Callable[[], object], part: float = 1.0) -> float:
        """Return the median time of some work, tried once before and for as long as a rate is given."""
        work()
        self._wait()
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 2 or (time.perf_counter() - begun < part * self.seconds and len(times) < 200):
            started = self.clock()
            work()
            self._wait()
            times.append(self.clock() - started)
        return max(statistics.median(times), 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _one_layer_config(size: ModelSize, layer: int) -> dict[str, Any]:
    """Return the configuration of a model with this one layer and few token ids."""
    geometry, config = size.geometry, dict(size.config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == geometry.num_layers:
            config[key] = [value[layer]]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        config[key] = None
    for key in ("quantization_config", "dtype", "per_layer_config", "architectures"):
        config.pop(key, None)
    return {**config, **geometry.layers_updates([layer]), **geometry.vocabulary_updates(_VOCAB)}


def stored_rates(key: str) -> Rates | None:
    """Return the rates of an earlier probe under a key; None where there are none."""
    with suppress(CheckpointError, KeyError, TypeError):
        return replace(Rates.from_dict(read_json(_file())[key]), source="stored")
    return None


def store_rates(key: str, rates: Rates) -> None:
    """Keep the rates of a probe, where the cache folder can be written."""
    known: Mapping[str, Any] = {}
    with suppress(CheckpointError):
        known = read_json(_file())
    with suppress(ExportError, OSError):
        write_json(_file(), {**known, key: rates.to_dict()})


def _file() -> Path:
    return cache_folder() / "rates.json"
