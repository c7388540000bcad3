"""Who takes which blocks, how shares come together, and what processes that differ are told."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.corpus import PackedBlocks
from secateur.corpus.pieces import Piece
from secateur.errors import ConfigError, CorpusError, ProcessError
from secateur.evaluate import evaluate_text
from secateur.families.loader import families
from secateur.pipeline.sharding import Collected, Order, Passes, Together, first_blocks, require_shares, share_of
from secateur.records.gram import GramsInMemory
from tests.blocks import hand_made_blocks
from tests.conftest import pico_model


def packed(rows: list[list[int]], tokens: int = 3) -> PackedBlocks:
    """Return blocks that hold a piece of these documents each."""
    blocks = [[Piece(np.arange(tokens, dtype=np.int32), document, 1, 0, 1) for document in row] for row in rows]
    count = 1 + max(max(row) for row in rows)
    total = sum(tokens * len(row) for row in rows)
    return PackedBlocks("c", "calibration", "f", torch.arange(count), total, len(rows), 0, 0, 64, blocks)


def documents(blocks: PackedBlocks) -> list[list[int]]:
    """Return which documents each block holds."""
    return [[piece.document for piece in block] for block in blocks.blocks]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_block_is_taken_once_as_it_was_packed(world_size: int) -> None:
    """Process r takes blocks r, r + n, ...; text, documents and their indices stay those of the whole."""
    rows = [[0], [1, 2], [3], [4, 5, 6], [7]]
    whole = packed(rows)
    shares = [share_of(whole, rank, world_size) for rank in range(world_size)]
    for rank, share in enumerate(shares):
        assert documents(share) == rows[rank::world_size]
        assert share.fingerprint == whole.fingerprint and torch.equal(share.documents, whole.documents)
    assert sum(share.num_tokens for share in shares) == whole.num_tokens
    assert sum(share.num_blocks for share in shares) == whole.num_blocks


def test_whole_documents_stay_with_one_process() -> None:
    """Where documents are judged as wholes, blocks that share one go together; the groups are dealt out evenly."""
    whole = packed([[0], [1], [0, 2], [3], [2, 4], [5], [1]])  # {0, 2, 4} over blocks 0 2 4, {1} over 1 6, 3, 5
    shares = [share_of(whole, rank, 2, keep_documents=True) for rank in (0, 1)]
    owned = [{document for row in documents(share) for document in row} for share in shares]
    assert not owned[0] & owned[1] and owned[0] | owned[1] == set(range(6))
    assert [share.num_blocks for share in shares] == [4, 3]
    with pytest.raises(CorpusError, match=r"4 groups of blocks that share no document, for 5 processes.*at most 4"):
        share_of(whole, 0, 5, keep_documents=True)


def test_more_processes_than_blocks_are_refused() -> None:
    """The message says how many may be started."""
    with pytest.raises(CorpusError, match=r"has 2 blocks for 3 processes.*Start at most 2"):
        require_shares(packed([[0], [1]]), 3)


@pytest.mark.parametrize(("limit", "blocks"), [(1, 1), (6, 2), (8, 2), (9, 3), (100, 3)])
def test_whole_blocks_are_taken_up_to_a_limit(limit: int, blocks: int) -> None:
    """As many as fit, and one at least."""
    assert first_blocks(packed([[0], [1], [2]]), limit).num_blocks == blocks


@dataclass
class Crowd:
    """Threads that stand for processes: each gives a value, and all get all values."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate = threading.Barrier(self.size, timeout=30)

    def run(self, work: Callable[[_Member], Any]) -> list[Any]:
        """Return what each thread's work returns or raises."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                found[rank] = work(_Member(rank, self.size, None, crowd=self))
            except Exception as error:  # what it raises is what is asked
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@dataclass
class _Member(Together):
    crowd: Any = None

    def _gather(self, value: Any) -> list[Any]:
        self.crowd.values[self.rank] = value
        self.crowd.gate.wait()
        found = [self.crowd.values[rank] for rank in range(self.world_size)]
        self.crowd.gate.wait()
        return found


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_losses_come_together_in_the_order_of_documents(world_size: int) -> None:
    """Each process measures some batches; all have the score of one, also where there is no batch for some."""
    family = families()["llama"]
    blocks = hand_made_blocks()
    alone = evaluate_text(pico_model(family), blocks, family, batch_size=2)
    models = [pico_model(family) for _ in range(world_size)]

    def measure(ranks: _Member) -> Any:
        return evaluate_text(models[ranks.rank], blocks, family, batch_size=2, ranks=ranks)

    for score in Crowd(world_size).run(measure):
        assert score.document_nll == pytest.approx(alone.document_nll, rel=1e-12)
        assert score.document_tokens == alone.document_tokens and score.document_bytes == alone.document_bytes
        assert score.nll_stderr == pytest.approx(alone.nll_stderr, rel=1e-9)


def test_a_failure_is_heard_wherever_the_others_are() -> None:
    """The one that fails raises its own error, the others one that names it; nobody waits."""

    def work(ranks: _Member) -> None:
        with ranks.telling():
            if ranks.rank == 1:
                raise CorpusError("no text.")
            ranks.exchange("a value")

    first, second, third = Crowd(3).run(work)
    assert isinstance(second, CorpusError)
    for error in (first, third):
        assert isinstance(error, ProcessError) and str(error) == "process 1 of 3 stopped: no text."


def test_processes_that_differ_are_refused_by_name() -> None:
    """All of them refuse, and say which process differs in what."""

    def work(ranks: _Member) -> None:
        with ranks.telling():
            ranks.require_alike({"torch": "2.6" if ranks.rank == 2 else "2.7", "model (fingerprint)": "ab"})

    for error in Crowd(3).run(work):
        assert isinstance(error, ConfigError)
        assert "process 2 has another torch than process 0: 2.6 instead of 2.7" in str(error)


def test_shares_of_a_pass_add_up(tmp_path: Path) -> None:
    """Process 0 gets the sums of all blocks and leaves no share behind; other text is refused."""
    whole = packed([[0], [1], [2], [3], [4]])

    def run(_order: Order, blocks: PackedBlocks) -> Collected:
        total = torch.full((2, 2), float(sum(piece.document for block in blocks.blocks for piece in block)))
        return Collected(grams=GramsInMemory(blocks.num_tokens, {(0, "ffn_channel"): total}))

    def work(ranks: _Member) -> Any:
        passes = Passes(run, lambda _order: whole, tmp_path, ranks)
        with ranks.telling():
            if not ranks.is_main:
                return passes.serve()
            found = passes.collect(Order("grams", "c"))
            passes.dismiss()
            return found

    found = Crowd(3).run(work)
    assert found[1:] == [None, None]
    assert found[0].grams.count == whole.num_tokens
    assert torch.equal(found[0].grams.load((0, "ffn_channel")), torch.full((2, 2), 10.0))
    assert not (tmp_path / "statistics" / "shares").exists()


def test_what_process_0_should_have_left_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that finds nothing in the run folder looks at another folder, and says so."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ProcessError, match="file system that they share"):
        Passes(lambda *_: Collected(), lambda _order: packed([[0]]), tmp_path).collect(Order("statistics", "c"))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x")])
def test_a_lost_or_changed_share_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any]
) -> None:
    """Process 0 takes no share that is not what its process wrote; the others hear of it, and none waits."""
    whole = packed([[0], [1], [2]])
    require_intact = Passes._require_intact

    def spoiled(self: Passes, rank: int, digests: dict[str, str]) -> None:
        spoil(tmp_path / "statistics" / "shares" / "2.grams.safetensors") if rank == 2 else None
        require_intact(self, rank, digests)

    monkeypatch.setattr(Passes, "_require_intact", spoiled)

    def run(_order: Order, blocks: PackedBlocks) -> Collected:
        return Collected(grams=GramsInMemory(blocks.num_tokens, {(0, "ffn_channel"): torch.ones(2, 2)}))

    def work(ranks: _Member) -> Any:
        passes = Passes(run, lambda _order: whole, tmp_path, ranks)
        try:
            with ranks.telling():
                return passes.collect(Order("grams", "c")) if ranks.is_main else passes.serve()
        except ProcessError as error:
            return str(error)

    told = Crowd(3).run(work)
    where = "the share of process 2 (is not at|at) .*2.grams.safetensors"
    assert all(re.search(where, message) for message in told), told
