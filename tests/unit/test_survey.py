"""A look at a vocabulary: the curve of frequencies, and costs that equal what the tokenizers themselves say."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from secateur.allocate.vocabulary import choose_tokens
from secateur.corpus import document_hash, read_documents
from secateur.corpus.split import assign_split
from secateur.errors import CorpusError, TokenizerError
from secateur.files import CACHE_VARIABLE
from secateur.pipeline.vocabulary import read_vocabulary
from secateur.recipe import CorpusSpec, VocabularySpec
from secateur.records.survey import VocabularySurvey
from secateur.store.checkpoints import Checkpoint, load_tokenizer, resolve_model
from secateur.store.tokenizers import smaller_tokenizer
from secateur.survey import DEFAULT_RULES, curve_sizes, survey_vocabulary
from tests.pico import general_paragraphs, medical_records, save_model_folder, write_records
from tests.tiny_tokenizers import tiny_tokenizer, training_texts

Rules = tuple[Mapping[str, int | float], ...]
RULES: Rules = ({"min_count": 1}, {"min_count": 60}, {"coverage": 0.5}, {"size": 300})
RARE: Rules = ({"min_count": 20},)
TEMPLATE = "Question: {question}\nAnswer: {answer}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a cache folder in it."""
    folder = tmp_path_factory.mktemp("survey")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    """A pico model, without its weights."""
    return resolve_model(str(save_model_folder(folder / "pico")))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def domain(folder: Path) -> CorpusSpec:
    """Questions and answers."""
    return CorpusSpec(path=str(write_records(folder / "medical.jsonl", medical_records(120))), text=TEMPLATE)


@pytest.fixture(scope="module")
def general(folder: Path) -> CorpusSpec:
    """Paragraphs on other matters."""
    records = [{"text": text} for text in general_paragraphs(100)]
    return CorpusSpec(path=str(write_records(folder / "general.jsonl", records)))


@pytest.fixture(scope="module")
def survey(checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec, general: CorpusSpec) -> VocabularySurvey:
    """The domain against the general text, under every rule."""
    return survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec(), rules=RULES, compare=general)


@pytest.fixture(scope="module")
def texts(folder: Path) -> CorpusSpec:
    """Sentences in many scripts, which use many more tokens than the domain does."""
    return CorpusSpec(path=str(write_records(folder / "text.jsonl", [{"text": text} for text in training_texts()])))


def tiny(kind: str, checkpoint: Checkpoint) -> tuple[Any, Checkpoint]:
    """Return a tiny tokenizer of a kind, and the model with seven rows more than it has ids."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    geometry = checkpoint.geometry
    padded = replace(geometry, dimensions={**geometry.dimensions, "vocab_size": len(tokenizer) + 7})
    return tokenizer, replace(checkpoint, geometry=padded)


@pytest.fixture(scope="module")
def mixed(checkpoint: Checkpoint, texts: CorpusSpec, general: CorpusSpec) -> VocabularySurvey:
    """The sentences in many scripts under a Llama 3 tokenizer, against the general text."""
    dense, model = tiny("llama3", checkpoint)
    return survey_vocabulary(model, dense, texts, spec=VocabularySpec(), rules=RARE, compare=general)


def documents_of(spec: CorpusSpec, split: str) -> list[str]:
    """Return the documents of a split, read and assigned one by one."""
    return [text for text in read_documents(spec) if assign_split(document_hash(text), spec.splits) == split]


def tokens_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text, cut one by one."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def expected_cost(dense: Any, smaller: Any, keep: tuple[int, ...], texts: list[str]) -> tuple[float, float, float]:
    """Return lost tokens, touched documents and inflation as shares, by looking at every document alone."""
    before, after = tokens_of(dense, texts), tokens_of(smaller, texts)
    lost = [sum(token not in keep for token in document) for document in before]
    num_tokens = sum(map(len, before))
    return sum(lost) / num_tokens, sum(map(bool, lost)) / len(texts), sum(map(len, after)) / num_tokens - 1


def test_the_rows_of_the_curve_are_round_numbers_and_the_last_is_everything() -> None:
    """None is larger than what there is; nothing at all has no row."""
    assert curve_sizes(0) == []
    assert curve_sizes(7) == [7]
    assert curve_sizes(1000) == [100, 1000]
    assert curve_sizes(20_001) == [100, 1000, 2000, 5000, 10_000, 20_000, 20_001]


def test_the_curve_only_rises_and_ends_with_all_that_was_counted(mixed: VocabularySurvey) -> None:
    """More ids cover more; the last row covers all counted text, and held-out text less or as much."""
    assert len(mixed.frequencies) > 1
    for attribute in ("num_ids", "coverage", "heldout_coverage", "other_coverage"):
        values = [getattr(row, attribute) for row in mixed.frequencies]
        assert values == sorted(values)
    first, last = mixed.frequencies[0], mixed.frequencies[-1]
    assert last.coverage == 1.0 > last.heldout_coverage > 0.9
    assert first.per_million > last.per_million > 0


def test_the_curve_equals_counting_by_hand(mixed: VocabularySurvey, checkpoint: Checkpoint, texts: CorpusSpec) -> None:
    """Most used ids of the calibration split, lower ids first among equals; coverage of both splits."""
    dense, _ = tiny("llama3", checkpoint)
    counted, heldout = (
        [token for document in tokens_of(dense, documents_of(texts, split)) for token in document]
        for split in ("calibration", "test")
    )
    uses = Counter(counted)
    top = set(sorted(uses, key=lambda token: (-uses[token], token))[:100])
    row = mixed.frequencies[0]
    assert row.num_ids == 100
    assert row.coverage == pytest.approx(sum(token in top for token in counted) / len(counted))
    assert row.heldout_coverage == pytest.approx(sum(token in top for token in heldout) / len(heldout))
    assert row.per_million == pytest.approx(1e6 * min(uses[token] for token in top) / len(counted))
    assert (mixed.counted.num_tokens, mixed.heldout.num_tokens) == (len(counted), len(heldout))


def test_what_stays_and_what_goes_add_up(survey: VocabularySurvey, checkpoint: Checkpoint) -> None:
    """Every rule keeps at least the smallest vocabulary and not all; parameters are rows of the tied embedding."""
    assert survey.num_ids == survey.num_rows == 400
    assert survey.num_unreachable == 0
    for rule in survey.rules:
        assert not rule.problem
        assert survey.smallest_size <= rule.num_kept < survey.num_rows
        assert rule.num_kept == sum(rule.reasons.values()) >= rule.num_chosen > 0
        assert rule.parameters_removed == 64 * (survey.num_rows - rule.num_kept)
        assert rule.bytes_saved == 4 * rule.parameters_removed
    assert survey.rules[-1].num_kept == 300
    assert survey.total_parameters == sum(math.prod(shape) for shape in checkpoint.shapes.values())


def test_costs_equal_a_direct_computation(
    survey: VocabularySurvey, checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec, general: CorpusSpec
) -> None:
    """Lost tokens, touched documents and inflation, on the domain's test split and on the other corpus'."""
    ids = [token for document in tokens_of(tokenizer, documents_of(domain, "calibration")) for token in document]
    vocabulary = read_vocabulary(tokenizer, VocabularySpec(), num_rows=survey.num_rows, configs=(checkpoint.config,))
    for found in survey.rules:
        counts = torch.bincount(torch.tensor(ids), minlength=vocabulary.graph.num_ids)
        keep = choose_tokens(vocabulary, counts, found.rule).keep
        smaller = smaller_tokenizer(tokenizer, keep)
        for cost, spec in ((found.heldout, domain), (found.other, general)):
            assert cost is not None
            expected = expected_cost(tokenizer, smaller, keep, documents_of(spec, "test"))
            assert (cost.lost_ratio, cost.touched_ratio, cost.inflation) == pytest.approx(expected)
    costs = [rule.heldout for rule in survey.rules]
    assert all(cost is not None and cost.inflation > 0 for cost in costs[1:])


def test_the_comparison_is_symmetric(
    survey: VocabularySurvey, checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec, general: CorpusSpec
) -> None:
    """The two corpora have the same overlap whichever comes first; a corpus overlaps with itself entirely."""
    swapped = survey_vocabulary(
        checkpoint, tokenizer, general, spec=VocabularySpec(), rules=[{"min_count": 1}], compare=domain
    )
    assert swapped.counted == survey.other_counted and swapped.heldout == survey.other_heldout
    ends = (survey.frequencies[-1].overlap, swapped.frequencies[-1].overlap)
    assert ends[0] == ends[1] is not None and 0 < ends[0] < 1
    itself = survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec(), rules=[RULES[1]], compare=domain)
    assert {row.overlap for row in itself.frequencies} == {1.0}
    assert all(row.other_coverage == row.coverage for row in itself.frequencies)
    assert itself.rules[0].heldout == itself.rules[0].other


def test_a_rule_that_cannot_be_met_stops_no_other(checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec) -> None:
    """Its row says why."""
    rules: Rules = ({"size": 5}, {"min_count": 5}, {"size": 400}, {"threshold": 0.0})
    found = survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec(), rules=rules)
    assert [rule.label for rule in found.rules] == ["size 5", "min_count 5", "size 400", "threshold 0.0"]
    too_small, fine, too_large, paper = found.rules
    assert "too small" in too_small.problem and "removes nothing" in too_large.problem
    assert too_small.heldout is None and too_small.num_kept == 0
    assert fine.problem == paper.problem == ""
    assert fine.heldout is not None and fine.other is None
    assert found.other_counted is None and found.other_heldout is None
    assert all(row.overlap is None and row.other_coverage is None for row in found.frequencies)


def test_the_default_rules_go_from_careful_to_bold(checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec) -> None:
    """A survey is plain data for JSON; nobody needs to name a rule."""
    found = survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec())
    assert [rule.rule for rule in found.rules] == list(DEFAULT_RULES)
    kept = [rule.num_kept for rule in found.rules[:4]]
    assert kept == sorted(kept, reverse=True)
    assert json.loads(json.dumps(found.to_dict())) == {
        **found.to_dict(),
        "frequencies": list(found.to_dict()["frequencies"]),
        "rules": list(found.to_dict()["rules"]),
    }


def test_keep_lists_stay(checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec) -> None:
    """A kept word costs ids and is counted among what the rule did not choose."""
    rules: Rules = ({"min_count": 10_000},)
    plain = survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec(), rules=rules)
    listed = survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec(keep=["discharge"]), rules=rules)
    assert listed.smallest_size > plain.smallest_size
    assert listed.rules[0].reasons["keep list"] > 0
    assert listed.rules[0].num_kept > plain.rules[0].num_kept


def test_max_tokens_limits_every_split(checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec) -> None:
    """Reading stops with the document that reaches the limit, and costs are those of the documents read."""
    found = survey_vocabulary(checkpoint, tokenizer, domain, spec=VocabularySpec(max_tokens=200), rules=RULES[:2])
    for text, split in ((found.counted, "calibration"), (found.heldout, "test")):
        lengths = list(map(len, tokens_of(tokenizer, documents_of(domain, split))))
        read = lengths[: text.num_documents]
        assert sum(read[:-1]) < 200 <= sum(read) == text.num_tokens
    assert all(rule.heldout is not None and rule.heldout.touched_ratio <= 1 for rule in found.rules)


def test_counted_documents_are_never_held_out(checkpoint: Checkpoint, tokenizer: Any, tmp_path: Path) -> None:
    """Where the owner's two files share documents, those are not measured on; where they share all, it is refused."""
    records = medical_records(30, seed=5)
    write_records(tmp_path / "train.jsonl", records[:20])
    write_records(tmp_path / "test.jsonl", records[10:])
    spec = CorpusSpec(calibration=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), text=TEMPLATE)
    found = survey_vocabulary(checkpoint, tokenizer, spec, spec=VocabularySpec(), rules=RULES[:1])
    assert (found.counted.num_documents, found.heldout.num_documents) == (20, 10)
    assert (found.counted.name, found.heldout.name) == (spec.calibration, spec.test)
    same = replace_paths(spec, test=spec.calibration)
    with pytest.raises(CorpusError, match="0 for split test"):
        survey_vocabulary(checkpoint, tokenizer, same, spec=VocabularySpec(), rules=RULES[:1])


def replace_paths(spec: CorpusSpec, **changes: Any) -> CorpusSpec:
    """Return a corpus spec with other paths."""
    return CorpusSpec(**{**spec.model_dump(), **changes})


def test_too_few_documents_are_refused(checkpoint: Checkpoint, tokenizer: Any, tmp_path: Path) -> None:
    """One document cannot be counted and held out."""
    file = write_records(tmp_path / "one.jsonl", medical_records(1))
    with pytest.raises(CorpusError, match="0 for split"):
        survey_vocabulary(
            checkpoint, tokenizer, CorpusSpec(path=str(file), text=TEMPLATE), spec=VocabularySpec(), rules=RULES[:1]
        )


def test_a_configuration_that_names_no_row_is_refused(
    checkpoint: Checkpoint, tokenizer: Any, domain: CorpusSpec
) -> None:
    """Before any text is read: every rule would fail for it."""
    wrong = replace(checkpoint, config={**checkpoint.config, "decoder_start_token_id": 9999})
    with pytest.raises(TokenizerError, match="decoder_start_token_id = 9999"):
        survey_vocabulary(wrong, tokenizer, domain, spec=VocabularySpec(), rules=RULES[:1])


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "unigram"])
def test_other_kinds_of_tokenizers_are_surveyed(checkpoint: Checkpoint, texts: CorpusSpec, kind: str) -> None:
    """Padded rows have no token, and no token is unreachable."""
    dense, model = tiny(kind, checkpoint)
    found = survey_vocabulary(model, dense, texts, spec=VocabularySpec(), rules=RARE)
    assert (found.num_rows - found.num_ids, found.num_unreachable) == (7, 0)
    cost = found.rules[0].heldout
    assert cost is not None and cost.touched_ratio > cost.lost_ratio > 0 and cost.inflation > 0


def test_tokens_that_no_merge_makes_are_counted(mixed: VocabularySurvey) -> None:
    """The tokenizer looks whole words up before it merges."""
    assert mixed.num_unreachable > 0
