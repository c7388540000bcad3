"""Calibration and evaluation by several processes: who takes which blocks, how shares come together, what is told.

Process 0 decides and writes; the others take their share of the blocks of every pass that it orders. Shares of
statistics, which may be as large as the model, go through files in the run folder, which all processes need anyhow to
load what was pruned; so process 0 holds one other share at a time (of Gram matrices one matrix), and nothing depends
on how large an object a network library can send. Everything small (orders, losses, failures) goes over gloo.

All talk is one kind of collective call, in which a value or a failure is given. So a process that fails is heard
wherever the others are, and none waits for an answer that will not come.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from secateur.corpus import PackedBlocks
from secateur.corpus.block_store import take_blocks
from secateur.corpus.split import Split
from secateur.errors import ConfigError, CorpusError, ProcessError
from secateur.pipeline import processes
from secateur.records.gradients import GradientStatistics, merge_gradients
from secateur.records.gram import Grams, GramsInMemory
from secateur.records.impacts import ImpactStatistics, merge_impacts
from secateur.records.ranks import ALONE, Ranks
from secateur.records.statistics import BucketStatistics, merge_buckets
from secateur.store.artifacts import (
    read_gradients,
    read_impacts,
    read_statistics,
    write_gradients,
    write_impacts,
    write_statistics,
)
from secateur.store.gram_files import read_grams, write_grams

AGAIN = "What was finished is kept: start the same command again in all processes."


@dataclass(frozen=True, slots=True)
class Order:
    """A pass over a text that all processes take a share of.

    Attributes:
        work: what is taken: ``statistics`` (and, where asked, Gram matrices and impacts in the same pass), ``grams``,
            ``gradients`` or ``impacts``.
        bucket: name of the text.
        split: of the bucket.
        grams: whether statistics come with Gram matrices.
        impacts: whether statistics come with what single documents say.
        fingerprint: of the text that process 0 read.
    """

    work: str
    bucket: str
    split: Split = "calibration"
    grams: bool = False
    impacts: bool = False
    fingerprint: str = ""

    @property
    def keeps_documents(self) -> bool:
        """Whether all of a document must be run by one process."""
        return self.impacts or self.work == "impacts"


@dataclass(frozen=True, slots=True)
class Collected:
    """What a pass, or a share of it, left; None for what was not taken."""

    statistics: BucketStatistics | None = None
    grams: GramsInMemory | None = None
    gradients: GradientStatistics | None = None
    impacts: ImpactStatistics | None = None


Pass = Callable[[Order, PackedBlocks], Collected]
"""Runs blocks through the dense model."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a process says when its share is done: the seconds of its pass, and a hash of each file it wrote."""

    seconds: float
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a process gives instead of a value when it cannot go on."""

    message: str


@dataclass
class Together:
    """Implements ``Ranks`` over ``torch.distributed``.

    Attributes:
        rank: the number of this process.
        world_size: how many there are.
        group: over which they talk.
        is_heard: whether the others listen; False once talk is pointless, and where they talk otherwise.
    """

    rank: int
    world_size: int
    group: Any
    is_heard: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """Return what every process gave, in their order.

        Raises:
            ProcessError: one of them failed, or is gone.
        """
        try:
            found = self._gather(value)
        except RuntimeError as error:
            self.is_heard = False
            raise ProcessError(
                f"process {self.rank} lost another of the {self.world_size} processes: it was killed, or its machine "
                f"or network failed ({str(error).splitlines()[0][:120]}). {AGAIN}"
            ) from None
        failures = [(rank, told) for rank, told in enumerate(found) if isinstance(told, _Failure)]
        if failures and not isinstance(value, _Failure):
            self.is_heard = False
            rank, told = failures[0]
            raise ProcessError(f"process {rank} of {self.world_size} stopped: {told.message}")
        return found

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def same(self, value: Any) -> Any:
        """Return what process 0 gave, on all of them."""
        return self.exchange(value)[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        self.exchange(None)

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Return the result of some work, which process 0 ends before the others begin it."""
        if self.is_main:
            found = work()
            self.wait()
            return found
        self.wait()
        return work()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Leave talk to others, such as a trainer, while the context lasts."""
        self.is_heard = False
        yield
        self.is_heard = True

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others when this process fails, and end it with a message when it is told to end."""
        try:
            with _told_to_end(self):
                yield
        except Exception as error:
            if self.is_heard:
                self.exchange(_Failure(str(error)))
            raise

    def require_alike(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that would do different work.

        Args:
            facts: what must be the same in all, by the name a person knows it by.

        Raises:
            ConfigError: they differ; the process and what differs are named.
        """
        first, *others = self.exchange(dict(facts))
        for rank, found in enumerate(others, start=1):
            apart = [name for name in first if found.get(name) != first[name]]
            if apart:
                self.is_heard = False  # all of them refuse
                name = apart[0]
                raise ConfigError(
                    f"process {rank} has another {name} than process 0: {_brief(found.get(name))} instead of "
                    f"{_brief(first[name])}. Start all processes with the same recipe, model and packages."
                )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."


@contextmanager
def _told_to_end(ranks: Together) -> Iterator[None]:
    """Turn SIGTERM, which launchers send when one process is gone, into an error that says so."""

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ranks.is_heard = False
        raise ProcessError(
            f"process {ranks.rank} was told to end (SIGTERM); launchers do that when another of the "
            f"{ranks.world_size} processes is gone, and name it below. {AGAIN}"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def connect() -> Together:
    """Return this process among those that were started with it, once all have come."""
    group = processes.talk_group()
    return Together(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)


# -- who takes which blocks ----------------------------------------------------------------------------------------


def require_shares(blocks: PackedBlocks, world_size: int) -> None:
    """Refuse more processes than a text has blocks.

    Raises:
        CorpusError: a process would have nothing to do.
    """
    if blocks.num_blocks < world_size:
        raise CorpusError(
            f"{blocks.split} text of {blocks.name} has {blocks.num_blocks} blocks for {world_size} processes, so some "
            f"would have nothing to do. Start at most {blocks.num_blocks}, or give more text."
        )


def share_of(blocks: PackedBlocks, rank: int, world_size: int, *, keep_documents: bool = False) -> PackedBlocks:
    """Return the blocks that one process runs: every ``world_size``-th, packed as they are.

    Documents keep their index and the text its fingerprint, so that shares add up to what all blocks give.

    Args:
        blocks: packed text, the same in every process.
        rank: of the process.
        world_size: how many there are.
        keep_documents: deals out groups of blocks that share no document instead, each to the process with the fewest
            blocks.

    Raises:
        CorpusError: there are fewer blocks, or groups, than processes.
    """
    require_shares(blocks, world_size)
    chosen = list(range(rank, blocks.num_blocks, world_size))
    if keep_documents and world_size > 1:
        groups = _groups(blocks)
        if len(groups) < world_size:
            raise CorpusError(
                f"{blocks.split} text of {blocks.name} has {len(groups)} groups of blocks that share no document, for "
                f"{world_size} processes, and the method looks at whole documents. Start at most {len(groups)}, or "
                "give more text."
            )
        dealt: list[list[int]] = [[] for _ in range(world_size)]
        for group in groups:
            min(dealt, key=len).extend(group)
        chosen = sorted(dealt[rank])
    own = take_blocks(blocks.blocks, chosen)
    num_tokens = sum(len(piece.ids) for block in own for piece in block)
    return replace(blocks, blocks=own, num_blocks=len(own), num_tokens=num_tokens)


def first_blocks(blocks: PackedBlocks, max_tokens: int) -> PackedBlocks:
    """Return whole blocks from the start for as long as they have no more tokens than this, one at least."""
    taken, total = 0, 0
    for block in blocks.blocks:
        size = sum(len(piece.ids) for piece in block)
        if taken and total + size > max_tokens:
            break
        taken, total = taken + 1, total + size
    return replace(blocks, blocks=blocks.blocks[:taken], num_blocks=taken, num_tokens=total)


def _groups(blocks: PackedBlocks) -> list[list[int]]:
    """Return groups of blocks that share no document with another group, by their first block."""
    parent = list(range(blocks.num_blocks))

    def root(block: int) -> int:
        while parent[block] != block:
            parent[block] = parent[parent[block]]
            block = parent[block]
        return block

    seen: dict[int, int] = {}
    for index, block in enumerate(blocks.blocks):
        for piece in block:
            first = seen.setdefault(piece.document, index)
            low, high = sorted((root(first), root(index)))
            parent[high] = low
    found: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(blocks.num_blocks):
        found[root(index)].append(index)
    return list(found.values())


# -- passes --------------------------------------------------------------------------------------------------------


@dataclass
class Passes:
    """The passes of a run, by one process or by all.

    Attributes:
        run: runs blocks through the dense model.
        read: returns the blocks of an order.
        folder: of the run.
        ranks: the processes.
    """

    run: Pass
    read: Callable[[Order], PackedBlocks]
    folder: Path
    ranks: Ranks = ALONE

    @property
    def _shares(self) -> Path:
        return self.folder / "statistics" / "shares"

    def collect(self, order: Order) -> Collected:
        """Return what a pass leaves, each process having run its share; only process 0 calls it."""
        blocks = self.read(order)
        if not isinstance(self.ranks, Together):
            _require_writer(order)
            return self.run(order, blocks)
        order = replace(order, fingerprint=blocks.fingerprint)
        _ = [share_of(blocks, 0, self.ranks.world_size, keep_documents=order.keeps_documents)]
        shutil.rmtree(self._shares, ignore_errors=True)
        self.ranks.same(order)
        found = self._run_share(order, blocks)
        told: list[_Told] = self.ranks.exchange(_Told(_seconds(found), {}))
        seconds = max(share.seconds for share in told)
        for rank in range(1, self.ranks.world_size):
            self._require_intact(rank, told[rank].digests)
            found = _merged(found, self._read(order, rank))
        shutil.rmtree(self._shares, ignore_errors=True)
        if found.statistics is not None and seconds:
            speed = found.statistics.num_tokens / seconds
            found = replace(found, statistics=replace(found.statistics, tokens_per_s=speed))
        return found

    def serve(self) -> None:
        """Run a share of every pass that process 0 orders, until it orders no more."""
        assert isinstance(self.ranks, Together), "one process alone serves nobody"
        while (order := self.ranks.same(None)) is not None:
            found = self._run_share(order, self.read(order))
            self._write(order, found)
            self.ranks.exchange(_Told(_seconds(found), self._digests(self.ranks.rank)))

    def dismiss(self) -> None:
        """Let the others go: no pass will be ordered any more."""
        if isinstance(self.ranks, Together):
            self.ranks.same(None)

    def _run_share(self, order: Order, blocks: PackedBlocks) -> Collected:
        if blocks.fingerprint != order.fingerprint:
            raise CorpusError(
                f"process {self.ranks.rank} reads another {order.split} text of {order.bucket} than process 0. All "
                "machines need the same files and the same run folder."
            )
        rank, world_size = self.ranks.rank, self.ranks.world_size
        return self.run(order, share_of(blocks, rank, world_size, keep_documents=order.keeps_documents))

    def _file(self, rank: int, name: str) -> Path:
        return self._shares / f"{rank}.{name}.safetensors"

    def _write(self, order: Order, found: Collected) -> None:
        rank = self.ranks.rank
        self._shares.mkdir(parents=True, exist_ok=True)
        if found.statistics is not None:
            write_statistics(self._file(rank, "statistics"), found.statistics, {"bucket": order.bucket})
        if found.grams is not None:
            write_grams(self._file(rank, "grams"), found.grams, sorted(found.grams.sums), {"bucket": order.bucket})
        if found.gradients is not None:
            write_gradients(self._file(rank, "gradients"), found.gradients, {"bucket": order.bucket})
        if found.impacts is not None:
            write_impacts(self._file(rank, "impacts"), found.impacts, {"bucket": order.bucket})

    def _digests(self, rank: int) -> dict[str, str]:
        """Return a hash of every file of a process's share, by its name."""
        return {file.name: _digest(file) for file in sorted(self._shares.glob(f"{rank}.*"))}

    def _require_intact(self, rank: int, digests: Mapping[str, str]) -> None:
        """Refuse a share that is not what its process wrote.

        Raises:
            ProcessError: a file of it is not here, or has other content; it is named.
        """
        for name, digest in digests.items():
            path = self._shares / name
            if not path.is_file():
                raise ProcessError(
                    f"the share of process {rank} is not at {path}. All machines need the same run folder, on a file "
                    "system that they share: set output to such a folder."
                )
            if (found := _digest(path)) != digest:
                raise ProcessError(
                    f"the share of process {rank} at {path} is not what that process wrote: its hash is {found} here "
                    f"and {digest} there. Check the file system that the machines share. {AGAIN}"
                )

    def _read(self, order: Order, rank: int) -> _Stored:
        def file(name: str) -> Path:
            return self._file(rank, name)

        together = order.work == "statistics"
        return _Stored(
            read_statistics(file("statistics"))[0] if together else None,
            read_grams(file("grams"))[0] if order.work == "grams" or order.grams else None,
            read_gradients(file("gradients")) if order.work == "gradients" else None,
            read_impacts(file("impacts")) if order.keeps_documents else None,
        )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _seconds(found: Collected) -> float:
    """Return how long a share of the statistics took; the slowest says how fast all are."""
    known = found.statistics
    return known.num_tokens / known.tokens_per_s if known is not None and known.tokens_per_s else 0.0


def _require_writer(order: Order) -> None:
    """Refuse that a process takes by itself what process 0 should have left for it."""
    if processes.are_several() and not processes.is_main():
        raise ProcessError(
            f"the {order.work} of {order.bucket} are not in the run folder where this process looks. All machines need "
            "the same run folder, on a file system that they share: set output to such a folder."
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    """A share as it was read; Gram matrices are still on disk."""

    statistics: BucketStatistics | None
    grams: Grams | None
    gradients: GradientStatistics | None
    impacts: ImpactStatistics | None


def _merged(first: Collected, second: _Stored) -> Collected:
    """Return two shares as one; the Gram matrices of the first are added to in place."""
    grams = first.grams
    if grams is not None and second.grams is not None:
        for site, total in grams.sums.items():
            total += second.grams.load(site)
        grams = GramsInMemory(grams.count + second.grams.count, grams.sums)
    return Collected(
        merge_buckets(first.statistics, second.statistics) if first.statistics and second.statistics else None,
        grams,
        merge_gradients([first.gradients, second.gradients]) if first.gradients and second.gradients else None,
        merge_impacts([first.impacts, second.impacts]) if first.impacts and second.impacts else None,
    )
