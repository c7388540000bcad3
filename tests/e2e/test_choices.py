"""Runs that ask questions: what stands in the record and the report, and what is asked again."""

from __future__ import annotations

import json
from pathlib import Path

import secateur
from tests.pico import Pico


def write_questions(file: Path) -> str:
    """Write twelve questions of two subjects and return the path."""
    rows = [
        {
            "question": f"Which town is {n}?",
            "choices": ["Aville", f"Btown {n}", "Cburg"],
            "answer": n % 3,
            "area": f"a{n % 2}",
        }
        for n in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_run_asks_questions_and_keeps_what_they_show(pico: Pico, tmp_path: Path) -> None:
    """Subjects and the paper's scoring are in the record; without a signal nothing is claimed; more is asked again."""
    exam = {"path": write_questions(tmp_path / "q.jsonl"), "subject": "area"}
    plain = {"prune": {"budget": {"channels": 0.5}}, "evaluate": {"controls": [], "choices": {"exam": exam}}}
    first = secateur.run(pico.recipe(tmp_path / "run", **plain))
    assert first.evaluation is not None
    assert first.evaluation.models["dense"].choices["exam"].acc_perplexity is None
    whole = {**plain, "evaluate": {"controls": [], "choices": {"exam": {**exam, "perplexity": True}}}}
    result = secateur.run(pico.recipe(tmp_path / "run", **whole))
    assert not any(name.startswith("evaluate:") for name in result.reused)
    assert result.evaluation is not None
    for name, model in result.evaluation.models.items():
        score = model.choices["exam"]
        assert score.acc_perplexity is not None
        assert list(score.subjects()) == ["a0", "a1"]
        assert score.item_correct == first.evaluation.models[name].choices["exam"].item_correct
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["models"]["pruned"]["choices"]["exam"]["subjects"]["a1"]["num_items"] == 6
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Right answers by subject (acc, %)" in report
    assert "exam: no signal. The dense model answers" in report
