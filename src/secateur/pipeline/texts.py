"""The text of a run: which documents each split takes, each read once, none both learned from and measured on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secateur.corpus import PackedBlocks, load_split, resegment
from secateur.corpus.choices import ChoiceItem, PackedChoices, pack_choices, read_choices
from secateur.corpus.hashes import DocumentHashes
from secateur.corpus.packing import restrict
from secateur.corpus.split import Split
from secateur.errors import CheckpointError
from secateur.pipeline.grams import judging_tokens
from secateur.pipeline.responses import ResponsesStage
from secateur.progress import Progress, silent
from secateur.recipe import Recipe
from secateur.store.checkpoints import Checkpoint


@dataclass
class Texts:
    """Reads splits of the recipe's buckets, each of them once.

    Attributes:
        recipe: says where the text is, and how much of it is taken.
        checkpoint: the dense model, whose vocabulary the text must fit.
        load_tokenizer: returns its tokenizer; called when text is read.
        calibrated: given a bucket, the hashes of the documents that it is or will be calibrated on.
        seen: the hashes of all documents that must not be in a test text.
        keep_text: keeps the text itself of what is measured, so that another tokenizer can read it.
        progress: told about everything that takes time.
        responses: gives the calibration text of buckets that the dense model answers; None where there are none.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    load_tokenizer: Callable[[], Any]
    calibrated: Callable[[str], Collection[int]]
    seen: Callable[[], Collection[int]]
    keep_text: bool
    progress: Progress = silent
    responses: ResponsesStage | None = None
    _read: dict[tuple[str, Split], PackedBlocks] = field(default_factory=dict)
    _sizing: dict[str, PackedBlocks] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        """The dense model's tokenizer."""
        return self.load_tokenizer()

    @cached_property
    def test(self) -> dict[str, PackedBlocks]:
        """The test text of every bucket."""
        return {name: self.read(name, "test") for name in self.recipe.buckets()}

    @cached_property
    def questions(self) -> dict[str, list[ChoiceItem]]:
        """The multiple-choice questions of every set; reading them checks every row."""
        return {name: read_choices(spec, name) for name, spec in self.recipe.evaluate.choices.items()}

    def packed_questions(
        self, name: str, tokenizer: Any, most: int | None = None, *, scores_whole: bool = False
    ) -> PackedChoices:
        """Return the questions of a set as a tokenizer cuts them, at most so many; see ``pack_choices``."""
        dimensions, config = self.checkpoint.geometry.dimensions, self.checkpoint.config
        limit = dimensions.get("num_positions") or config.get("max_position_embeddings")
        items = self.questions[name][:most]
        return pack_choices(
            items,
            tokenizer,
            block_size=self.recipe.calibrate.block_size,
            max_length=limit,
            window=config.get("sliding_window"),
            scores_whole=scores_whole,
            name=name,
        )

    def split(self, name: str, split: Split) -> PackedBlocks:
        """Return a split of a bucket, of the recipe's size."""
        if (name, split) not in self._read:
            self._read[name, split] = self.read(name, split)
        return self._read[name, split]

    def sizing(self, name: str) -> PackedBlocks:
        """Return the validation text that decides how small the model may be.

        It is as much as the test text is. Documents that judge the fits of a reconstruction are left out, because fits
        chosen on them look better there than elsewhere; only where nearly nothing else is left, they serve here too.
        """
        if name in self._sizing:
            return self._sizing[name]
        most, judging = self.recipe.evaluate.max_tokens, 0
        judged: Collection[int] = ()
        if self.recipe.prune.reconstruct != "none":
            judged = DocumentHashes(self.split(name, "validation").documents.numpy())
            judging = self.split(name, "validation").num_tokens
        total = None if most is None else most + judging
        blocks = self.read(name, "validation", total, whole=total is None)
        fresh = [place for place, document in enumerate(blocks.documents.tolist()) if document not in judged]
        if judged and blocks.num_tokens >= 2 * judging and fresh:
            blocks = restrict(blocks, fresh, most)
        self._sizing[name] = blocks
        return blocks

    def look_at(self, name: str, split: Split) -> None:
        """Read a split of a bucket, so that too little text is said now; of one that is answered only the prompts."""
        if self.responses is not None and self._is_answered(name, split):
            _ = self.responses.prompts(name)
        else:
            _ = self.split(name, split)

    def _is_answered(self, name: str, split: Split) -> bool:
        return split == "calibration" and self.responses is not None and self.responses.has(name)

    def has(self, name: str, split: Split) -> bool:
        """Return whether a split was read already."""
        return (name, split) in self._read

    def read(
        self,
        name: str,
        split: Split,
        max_tokens: int | None = None,
        *,
        whole: bool = False,
        keep_text: bool = False,
        as_written: bool = False,
    ) -> PackedBlocks:
        """Return a split of a bucket, of another size where one is given.

        The calibration split of a bucket with ``responses`` is what the dense model answers.

        Args:
            name: of the bucket.
            split: which of its splits.
            max_tokens: most tokens to take; None for as many as the recipe says.
            whole: takes all tokens there are.
            keep_text: keeps the text of a calibration split too.
            as_written: takes the records' own text, whoever answers them.
        """
        if self.responses is not None and self._is_answered(name, split) and not as_written:
            return self.responses.blocks(name, None if whole else max_tokens or self._max_tokens(split))
        exclude: Collection[int] = frozenset()
        if split == "test":
            exclude = self.seen()
        elif split == "validation":
            exclude = self.calibrated(name)
        with self.progress(f"read {name} text ({split})", None, "") as task:
            blocks = load_split(
                self.recipe.buckets()[name],
                split,
                self.tokenizer,
                block_size=self.recipe.calibrate.block_size,
                max_tokens=None if whole else max_tokens or self._max_tokens(split),
                exclude=exclude,
                name=name,
                keep_text=keep_text or (split != "calibration" and self.keep_text),
            )
            task.advance(1)
        self._require_known_tokens(blocks)
        return blocks

    def _max_tokens(self, split: Split) -> int | None:
        calibrate = self.recipe.calibrate
        if split == "test":
            return self.recipe.evaluate.max_tokens
        if split == "calibration":
            return calibrate.max_tokens
        return judging_tokens(calibrate.max_tokens, calibrate.block_size)

    def _require_known_tokens(self, blocks: PackedBlocks) -> None:
        """Refuse token ids that the model has no embedding for: the tokenizer is another model's."""
        known = self.checkpoint.geometry.dimensions["vocab_size"]
        largest = max(int(piece.ids.max()) for pieces in blocks.blocks for piece in pieces)
        if largest >= known:
            raise CheckpointError(
                f"the tokenizer of {self.checkpoint.spec} gives token id {largest}, but the model knows {known:,} "
                "tokens. They belong to different models; fetch both again."
            )

    def resegmented(self, blocks: PackedBlocks, tokenizer: Any) -> PackedBlocks:
        """Return the same text as another tokenizer cuts it; unchanged for the dense model's own."""
        limit = self.checkpoint.geometry.dimensions.get("num_positions")
        return blocks if tokenizer is self.tokenizer else resegment(blocks, tokenizer, max_block_size=limit)
