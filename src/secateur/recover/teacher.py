"""What a pruned model is trained towards: the text itself, or the dense model it came from; no optimizer and no data.

The dense model is the teacher, the pruned one the student (Hinton et al. 2015, arXiv 1503.02531). The teacher reads the
same text without gradients. Where the student's vocabulary is smaller, the student's ids are translated for the
teacher, and the teacher's probability is shared out among the ids that the student has. The teacher runs with every
batch, or once over the whole text if its most likely tokens are kept on disk (``cache_teacher``).

Dims: ``batch`` blocks, ``seq`` tokens per block, ``places`` positions at which some block of the batch predicts a
learned token, ``vocab`` the student's token ids, ``hidden`` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from secateur.errors import CheckpointError, ConfigError
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.recipe import DistillSpec
from secateur.records.top_classes import TopClasses
from secateur.recover.batch import TrainingBatch
from secateur.recover.examples import TrainingExamples, collate
from secateur.recover.losses import (
    distillation_loss,
    hidden_loss,
    next_token_loss,
    next_tokens,
    predicts,
    top_classes,
    top_k_distillation_loss,
)
from secateur.store.artifacts import digest
from secateur.store.teacher_logits import TeacherLogits, as_stored
from secateur.stream.forward import packed_inputs
from secateur.stream.stand_ins import plain_tensors

_TOKENS_PER_FILE = 2**16


class NextToken:
    """Learn the text: -log p of each learned token.

    Args:
        family: of the model.
    """

    name = "finetune"

    def __init__(self, family: Family) -> None:
        self._family = family

    def __call__(self, model: Any, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Return the loss summed over the batch's learned tokens, in nats."""
        places = _places(batch)
        logits = _run(model, self._family, batch, places.index).logits
        return next_token_loss(logits, places.targets, places.wanted)


class Distillation:
    """Learn from the teacher while it reads the same batch: a weighted sum of up to three losses per learned token.

    They are the divergence of the predictions from the teacher's (``distillation_loss``), the loss on the text
    (``next_token_loss``) and the distance of the residual stream from the teacher's (``hidden_loss``).

    The teacher is put into evaluation mode when it runs, gets no gradient and stays on its device.

    Args:
        teacher: the dense model.
        family: of both models.
        spec: weights and temperature; ``cached_logits`` is not looked at.
        keep: the teacher's id of each of the student's token ids; None where they are the same.
        kept_layers: the teacher's layers that the student has, ascending; None for all. Their residual streams are
            compared as ``matching_layers`` says.

    Raises:
        ConfigError: ``keep`` or ``kept_layers`` name what the teacher does not have.
    """

    name = "distill"

    def __init__(
        self,
        teacher: Any,
        family: Family,
        spec: DistillSpec,
        keep: Int64[Tensor, " vocab"] | None = None,
        kept_layers: Sequence[int] | None = None,
    ) -> None:
        _require_kept_ids(teacher, keep)
        num_layers = len(decoder_layers(teacher, family))
        kept = range(num_layers) if kept_layers is None else kept_layers
        if not all(0 <= layer < num_layers for layer in kept):
            raise ConfigError(
                f"the student is said to have layers {list(kept)} of a teacher that has {num_layers}. "
                "Give the teacher's layers that were kept, counted from 0."
            )
        self._teacher, self._family, self._spec, self._keep = teacher, family, spec, keep
        self._layers = matching_layers(kept, num_layers)

    def __call__(self, model: Any, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Return the weighted loss summed over the batch's learned tokens.

        Raises:
            ConfigError: the models' tokens or layers do not match, or training the one would change the other.
        """
        _require_own_weights(model, self._teacher)
        spec, places = self._spec, _places(batch)
        predicted = places.index if spec.logits_weight or spec.text_weight else places.index[:0]
        states = range(self._num_layers(model)) if spec.hidden_weight else ()
        told = _run(model, self._family, batch, predicted, states)
        terms = []
        if spec.logits_weight or spec.hidden_weight:
            taught = self._teach(batch, places)
            if spec.logits_weight:
                terms.append(spec.logits_weight * self._divergence(told.logits, taught.logits, places))
            if spec.hidden_weight:
                wished = [state.to(told.logits.device) for state in taught.states]
                terms.append(spec.hidden_weight * hidden_loss(told.states, wished, predicts(batch.learned)))
            del taught
        if spec.text_weight:
            terms.append(spec.text_weight * next_token_loss(told.logits, places.targets, places.wanted))
        return torch.stack(terms).sum()

    def _teach(self, batch: TrainingBatch, places: _Places) -> _Told:
        """Return the teacher's logits at the places, and the residual streams that the student's should equal."""
        predicted = places.index if self._spec.logits_weight else places.index[:0]
        states = self._layers if self._spec.hidden_weight else ()
        return _teach(self._teacher, self._family, batch, predicted, self._keep, states)

    def _divergence(self, student: Tensor, teacher: Tensor, places: _Places) -> Tensor:
        keep = None if self._keep is None else self._keep.to(student.device)
        _require_same_tokens(student, teacher.shape[-1] if keep is None else len(keep))
        return distillation_loss(student, teacher.to(student.device), places.wanted, self._spec.temperature, keep)

    def _num_layers(self, model: Any) -> int:
        count = len(decoder_layers(model, self._family))
        if count != len(self._layers):
            raise ConfigError(
                f"the student has {count} layers, and is said to have {len(self._layers)} of the teacher's. "
                "Give the teacher's layers that were kept."
            )
        return count


class CachedDistillation:
    """Learn from the teacher's most likely tokens, which ``cache_teacher`` has kept; no teacher is needed any more.

    The loss is as in ``Distillation``, with ``top_k_distillation_loss`` for the divergence and no residual stream.

    Args:
        family: of the model.
        spec: weights and temperature.
        cache: the teacher's predictions of the training blocks, made with the same ``spec`` for the model's token ids.

    Raises:
        ConfigError: ``spec`` asks for the residual stream, of which the cache knows nothing.
    """

    name = "distill"

    def __init__(self, family: Family, spec: DistillSpec, cache: TeacherLogits) -> None:
        if spec.hidden_weight:
            raise ConfigError(
                f"hidden_weight is {spec.hidden_weight}, and cached logits say nothing about hidden states. "
                "Set hidden_weight: 0, or leave cached_logits out."
            )
        self._cache, self._family, self._spec = cache, family, spec

    def __call__(self, model: Any, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Return the weighted loss summed over the batch's learned tokens.

        Raises:
            CheckpointError: the cache lacks a block, or is of a text with other learned tokens.
        """
        spec, places = self._spec, _places(batch)
        logits = _run(model, self._family, batch, places.index).logits
        terms = []
        if spec.logits_weight:
            taught = self._look_up(batch, logits.device)
            divergence = top_k_distillation_loss(logits, taught, places.wanted, spec.temperature)
            terms.append(spec.logits_weight * divergence)
        if spec.text_weight:
            terms.append(spec.text_weight * next_token_loss(logits, places.targets, places.wanted))
        return torch.stack(terms).sum()

    def _look_up(self, batch: TrainingBatch, device: torch.device) -> TopClasses:
        """Return the teacher's predictions of the batch's learned tokens, in order."""
        parts = []
        counts = batch.learned.sum(-1).tolist()
        for block, count in zip(batch.index.tolist(), counts, strict=True):
            part = self._cache.load(block)
            if len(part) != count:
                raise CheckpointError(
                    f"{self._cache.folder} holds the teacher's predictions of {len(part)} tokens of block {block}, and "
                    f"{count} are learned: it is of another text. Delete it; it will be made again."
                )
            parts.append(part)
        columns = ([getattr(part, name) for part in parts] for name in ("values", "indices", "log_rest"))
        with torch.autocast("cpu", enabled=False):  # it does not know float16 on a CPU
            return TopClasses(*(torch.cat(column).to(device) for column in columns))


def cache_teacher(
    teacher: Any,
    family: Family,
    examples: TrainingExamples,
    keep: Int64[Tensor, " vocab"] | None,
    spec: DistillSpec,
    folder: Path,
    key: str,
    progress: Progress = silent,
    *,
    batch_size: int = 4,
    label: str = "teacher",
) -> TeacherLogits:
    """Return the teacher's predictions of all blocks, from disk where they are there, else from the teacher.

    Memory does not grow with the text: a file is written for about every 65,000 learned tokens. Blocks on disk are not
    run again, so a run that was stopped goes on where it was; what is there for another teacher, text, vocabulary,
    temperature or number of tokens is removed.

    Args:
        teacher: the dense model, on its device; it is put into evaluation mode.
        family: of it.
        examples: the training blocks.
        keep: as in ``Distillation``.
        spec: how many tokens are kept (``cached_logits``), at which temperature.
        folder: where the predictions are or will be; nothing else should be there.
        key: identifies the teacher's weights.
        progress: told about finished blocks.
        batch_size: blocks per forward pass.
        label: name of the work for ``progress``.

    Raises:
        CheckpointError: a prediction is not finite, or a file is broken.
        ConfigError: ``keep`` names tokens that the teacher does not have, or ``spec`` asks for no cache.
        ExportError: the disk is full.
    """
    if spec.cached_logits is None:
        raise ConfigError("cached_logits is not set, so no logits are kept. Set it, for example to 64.")
    _require_kept_ids(teacher, keep)
    kept_ids = None if keep is None else keep.tolist()
    identity = digest(key, examples.fingerprint, spec.cached_logits, spec.temperature, kept_ids)
    cache = TeacherLogits(folder, identity)
    pending: list[TopClasses] = []
    with progress(label, examples.num_blocks, "blocks") as task:
        task.advance(cache.num_blocks)
        for start in range(cache.num_blocks, examples.num_blocks, batch_size):
            blocks = range(start, min(start + batch_size, examples.num_blocks))
            pending += _top_classes(teacher, family, _batch(examples, blocks), spec, keep)
            if sum(map(len, pending)) >= _TOKENS_PER_FILE:
                cache.append(pending)
                pending = []
            task.advance(len(blocks))
        if pending:
            cache.append(pending)
    return cache


def _batch(examples: TrainingExamples, blocks: Sequence[int]) -> TrainingBatch:
    items = collate([examples[block] for block in blocks])
    return TrainingBatch(items["input_ids"], items["position_ids"], items["learned"], items["index"])


def _top_classes(
    teacher: Any, family: Family, batch: TrainingBatch, spec: DistillSpec, keep: Tensor | None
) -> list[TopClasses]:
    """Return for each block the teacher's most likely tokens, as they are stored."""
    assert spec.cached_logits is not None
    places = _places(batch)
    logits = _teach(teacher, family, batch, places.index, keep).logits
    ids = None if keep is None else keep.to(logits.device)
    found = top_classes(logits, places.wanted.to(logits.device), spec.cached_logits, spec.temperature, ids)
    if not bool(torch.isfinite(found.values).all()):
        raise CheckpointError(
            "the teacher's predictions are not finite on the training text. Check its weights and dtype."
        )
    stored = as_stored(found)
    counts = places.wanted.sum(-1).tolist()
    columns = (getattr(stored, name).split(counts) for name in ("values", "indices", "log_rest"))
    return [TopClasses(*parts) for parts in zip(*columns, strict=True)]


def matching_layers(kept: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return for each kept layer the dense layer after which the residual stream should be what leaves the kept one.

    That is the layer before the next kept one, whose input the stream becomes, and for the last kept layer the last of
    all, whose output the final norm reads. Where nothing was removed in between it is the kept layer itself; where
    layers were, the kept layer is asked to make up for them.

    Args:
        kept: dense layers that the student has, ascending, at least one.
        num_layers: layers of the dense model.
    """
    return tuple(following - 1 for following in (*kept[1:], num_layers))


def decoder_layers(model: Any, family: Family) -> nn.ModuleList:
    """Return a model's decoder layers, also where adapters wrap it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers: nn.ModuleList = plain.get_submodule(family.layers)
    return layers


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where a batch predicts learned tokens.

    Attributes:
        index: positions at which some block does.
        wanted: which blocks do at which of these positions.
        targets: the tokens that follow.
    """

    index: Int64[Tensor, " places"]
    wanted: Bool[Tensor, "batch places"]
    targets: Int64[Tensor, "batch places"]


def _places(batch: TrainingBatch) -> _Places:
    wanted = predicts(batch.learned)
    index = wanted.any(0).nonzero()[:, 0]
    return _Places(index, wanted[:, index], next_tokens(batch.input_ids)[:, index])


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """What a model says to a batch: logits at some positions, and the residual stream after some layers."""

    logits: Float[Tensor, "batch places vocab"]
    states: list[Tensor]


def _run(
    model: Any,
    family: Family,
    batch: TrainingBatch,
    index: Int64[Tensor, " places"],
    layers: Sequence[int] = (),
    translate: Callable[[Tensor], Tensor] | None = None,
) -> _Told:
    """Run a model; the output head, the most expensive part of a small model, sees the given positions only."""
    weight = next(model.parameters())
    ids = batch.input_ids if translate is None else translate(batch.input_ids)
    inputs = packed_inputs(ids, batch.position_ids, family, model)
    with _residual_streams(decoder_layers(model, family), layers) as states:
        logits: Tensor = model(**inputs, logits_to_keep=index.to(weight.device)).logits
    return _Told(logits, [states[layer] for layer in layers])


def _teach(
    teacher: Any,
    family: Family,
    batch: TrainingBatch,
    index: Int64[Tensor, " places"],
    keep: Int64[Tensor, " vocab"] | None,
    layers: Sequence[int] = (),
) -> _Told:
    """Run the teacher without gradients on a batch in the student's token ids."""
    teacher.eval()
    translate = None if keep is None else lambda ids: keep.to(ids.device)[ids]
    with plain_tensors():
        return _run(teacher, family, batch, index, layers, translate)


@contextmanager
def _residual_streams(layers: nn.ModuleList, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect what leaves the wanted layers while the context lasts.

    What transformers returns as the last hidden state has been through the final norm, so it does not serve.
    """
    states: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in set(wanted):
            stack.callback(layers[layer].register_forward_hook(partial(_note, states, layer)).remove)
        yield states


def _note(states: dict[int, Tensor], layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
    states[layer] = output[0] if isinstance(output, tuple) else output


def _require_kept_ids(teacher: Any, keep: Tensor | None) -> None:
    num_tokens = teacher.get_input_embeddings().weight.shape[0]
    if keep is not None and (len(keep) == 0 or int(keep.min()) < 0 or int(keep.max()) >= num_tokens):
        raise ConfigError(
            f"the student's tokens are {len(keep)} ids of a teacher that has {num_tokens}, and some are not among "
            "these. Give the dense id of each of the student's ids."
        )


def _require_same_tokens(logits: Tensor, count: int) -> None:
    if logits.shape[-1] != count:
        raise ConfigError(
            f"the student has {logits.shape[-1]} token ids, and the teacher's predictions are for {count}. "
            "Give the dense id of each of the student's ids."
        )


def _require_own_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Pruning in memory leaves what is not cut where it is."""
    held = {parameter.data_ptr() for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() in held:
            raise ConfigError(
                f"the student shares {name} with its teacher, which would be trained with it. Copy one of the models."
            )
