"""Made-up answers of two models, and results of tasks, to describe."""

from __future__ import annotations

from dataclasses import replace

from secateur.records.generations import Answer, AnswerPair, Generations
from secateur.records.tasks import TaskMetric, TaskResults, TaskScore


def answer(*tokens: str, ended: bool = False) -> Answer:
    """Return an answer of these tokens."""
    ends = [len("".join(tokens[: count + 1])) for count in range(len(tokens))]
    return Answer("".join(tokens), tuple(ends), ended)


def generations(prompt: str = "Why?", word: str = " rest") -> Generations:
    """Return two prompts, the first with answers that part after two tokens and, sampled, with equal ones."""
    first = AnswerPair("medical", prompt, "greedy", answer("To", " be", " safe", " ."), answer("To", " be", word))
    second = replace(first, decoding="sampled", result=replace(first.dense))
    third = replace(first, prompt="Who?", dense=answer("A", ended=True), result=answer("A", " b"))
    return Generations("pruned", (first, second, third, replace(third, decoding="sampled")), 0.8, 0, 8, 1)


def metric(name: str, samples: tuple[float, ...], higher: bool | None = True) -> TaskMetric:
    """Return the mean of these numbers."""
    return TaskMetric(name, "none", sum(samples) / len(samples), 0.1, higher, samples)


def results(task: str = "terms", limit: float | None = None) -> TaskResults:
    """Return a task of forty documents: ``acc`` fell from 1 to 0.5, a perplexity stayed."""
    loss = TaskMetric("word_perplexity", "none", 12.5, None, False)
    dense = TaskScore(task, "1.0", 0, 40, "f", (metric("acc", (1.0,) * 40), loss))
    pruned = replace(dense, metrics=(metric("acc", (1.0, 0.0) * 20), loss))
    return TaskResults("0.4.13", limit, {"dense": {task: dense}, "pruned": {task: pruned}})
