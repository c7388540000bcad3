"""The generations' part of a run: prompts from the test text, answered by the dense model and by the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.corpus.prompts import document_starts, load_prompts
from secateur.corpus.readers import check_prompts
from secateur.errors import CheckpointError, ConfigError
from secateur.evaluate.generations import answer_prompts, fitting_prompts, pair_answers, require_chat_template
from secateur.pipeline.texts import Texts
from secateur.progress import Progress, silent
from secateur.recipe import GenerationsSpec
from secateur.records.generations import AnswerPair, Generations
from secateur.records.plan import Plan
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.run_folder import RunFolder

STAGE, FILE = "evaluate:generations", "generations.json"
PROMPT_KEY = "evaluate.generations.prompt"

Loader = Callable[[], tuple[Any, Any]]
"""Returns a transformers model and its tokenizer."""


@dataclass
class GenerationsStage:
    """Answers prompts with two models and keeps the answers in ``generations.json``.

    Attributes:
        spec: which prompts, and how they are answered; None where none are.
        texts: gives the test text.
        folder: the run's folder.
        progress: told about everything that takes time.
        reused: gets the stage's name where its result was still valid.
    """

    spec: GenerationsSpec | None
    texts: Texts
    folder: RunFolder
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)

    @property
    def _file(self) -> Path:
        return self.folder.path / FILE

    def check(self) -> None:
        """Refuse prompts that cannot be made or leave no room, and a chat that the tokenizer has no template for."""
        if self.spec is None:
            return
        positions = self._num_positions
        if positions is not None and positions <= self.spec.max_new_tokens:
            raise ConfigError(
                f"evaluate.generations.max_new_tokens is {self.spec.max_new_tokens}, but the model has {positions} "
                "positions, prompt included. Lower it."
            )
        if self.spec.prompt is not None:
            for spec in self.texts.recipe.domain.values():
                check_prompts(spec, self.spec.prompt, PROMPT_KEY)
        if self.spec.chat:
            require_chat_template(self.texts.tokenizer, self.spec)

    @property
    def _num_positions(self) -> int | None:
        return self.texts.checkpoint.geometry.dimensions.get("num_positions")

    def run(self, key: str, plan: Plan, row: str, dense: Loader, result: Loader) -> Generations | None:
        """Return the answers, from the folder where they are there; None where none are asked for.

        Args:
            key: hash of everything that the models and the test text depend on.
            plan: of the result.
            row: name of the result.
            dense: loads the dense model.
            result: loads the result.
        """
        if self.spec is None:
            self._file.unlink(missing_ok=True)
            return None
        key = digest(key, self.spec.model_dump())
        if self.folder.is_done(STAGE, key, self._file):
            self.reused.append(STAGE)
            return read_generations(self._file)
        started = time.perf_counter()
        self.folder.forget(STAGE)
        found = self._answered(self.spec, plan, row, dense(), result())
        write_json(self._file, found.to_dict())
        self.folder.finish(STAGE, key, started, prompts=len(found.by_prompt()))
        return found

    def _answered(
        self, spec: GenerationsSpec, plan: Plan, row: str, dense: tuple[Any, Any], result: tuple[Any, Any]
    ) -> Generations:
        num_tokens = self.texts.checkpoint.geometry.dimensions["vocab_size"]
        keep = None if plan.vocabulary is None else torch.tensor(plan.vocabulary.keep)
        room = None if self._num_positions is None else self._num_positions - spec.max_new_tokens
        pairs: list[AnswerPair] = []
        num_too_long = 0
        for domain in self.texts.recipe.domain:
            asked = self._prompts(spec, domain)
            prompts = fitting_prompts([dense[1], result[1]], asked, spec, room)
            num_too_long += len(asked) - len(prompts)
            answers = [
                answer_prompts(
                    model,
                    tokenizer,
                    prompts,
                    spec,
                    num_tokens=num_tokens,
                    keep=kept,
                    progress=self.progress,
                    label=f"answer {domain} prompts with {name}",
                )
                for name, (model, tokenizer), kept in (("dense", dense, None), (row, result, keep))
            ]
            pairs += pair_answers(domain, dense[1], prompts, spec, *answers)
        return Generations(row, tuple(pairs), spec.temperature, spec.seed, spec.max_new_tokens, num_too_long)

    def _prompts(self, spec: GenerationsSpec, domain: str) -> list[str]:
        """Return prompts from a domain's test text, each once."""
        if spec.prompt is None:
            starts = document_starts(
                self.texts.test[domain],
                self.texts.tokenizer,
                num_documents=spec.num,
                num_tokens=spec.prompt_tokens,
            )
            return list(starts)
        made = load_prompts(
            self.texts.recipe.domain[domain],
            spec.prompt,
            "test",
            exclude=self.texts.seen(),
            max_documents=spec.num,
            name=domain,
            key=PROMPT_KEY,
        )
        return list(dict.fromkeys(made.texts))


def read_generations(file: Path) -> Generations:
    """Return the answers in a file.

    Raises:
        CheckpointError: the file is broken, or of another version.
    """
    try:
        return Generations.from_dict(read_json(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} does not hold answers that secateur wrote: {error!r}. Delete it; it will be made again."
        ) from None
