"""A corpus spec gives its documents, from files or a data set, and is refused early when it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.corpus.readers import check_sources, explicit_splits, read_documents
from secateur.errors import CorpusError, UnavailableError
from secateur.recipe import CorpusSpec


def write(path: Path, *records: object) -> str:
    """Write records as JSON lines, or the only string as it is, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.suffix in {".txt", ".md"}
    path.write_text(str(records[0]) if plain else "".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Put a stand-in for ``datasets`` in place that gives rows or raises; return the calls it gets."""

    def install(outcome: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[Any]:
            calls.append((name, config, split, streaming))
            if isinstance(outcome, Exception):
                raise outcome
            return iter(outcome)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


def test_files_are_read_in_order(tmp_path: Path) -> None:
    """All files of a folder give their documents, sorted by path, whatever their format."""
    write(tmp_path / "b.txt", "two\n\nthree")
    write(tmp_path / "a.jsonl", {"text": "one"})
    write(tmp_path / "c/d.md", "# four\nx")
    assert list(read_documents(CorpusSpec(path=str(tmp_path)))) == ["one", "two", "three", "# four\nx"]


def test_template_applies_to_records_only(tmp_path: Path) -> None:
    """Records go through the template; plain text beside them stays as it is."""
    write(tmp_path / "a.jsonl", {"q": "why", "a": "so"})
    write(tmp_path / "b.txt", "plain {q}")
    spec = CorpusSpec(path=str(tmp_path), text="{q}: {a}")
    assert list(read_documents(spec)) == ["why: so", "plain {q}"]
    check_sources(spec)


def test_blank_documents_are_passed_over(tmp_path: Path) -> None:
    """Rows that come out as white space or null give no document."""
    path = write(tmp_path / "a.jsonl", {"text": None}, {"text": " \n"}, {"text": "x"})
    assert list(read_documents(CorpusSpec(path=path))) == ["x"]


def test_explicit_splits_name_their_own_paths(tmp_path: Path) -> None:
    """Each split reads its own files; without a split all are read."""
    spec = CorpusSpec(calibration=write(tmp_path / "c.txt", "c"), test=[write(tmp_path / "t.txt", "t")])
    assert explicit_splits(spec) == ("calibration", "test")
    assert list(read_documents(spec, "calibration")) == ["c"]
    assert list(read_documents(spec, "test")) == ["t"]
    assert list(read_documents(spec)) == ["c", "t"]
    check_sources(spec)


def test_a_split_without_paths_is_refused(tmp_path: Path) -> None:
    """Asking for validation when only calibration and test are named says so."""
    spec = CorpusSpec(calibration=write(tmp_path / "c.txt", "c"), test=write(tmp_path / "t.txt", "t"))
    with pytest.raises(CorpusError, match=r"names paths for calibration, test but none for validation\."):
        list(read_documents(spec, "validation"))


def test_one_path_serves_every_split(tmp_path: Path) -> None:
    """With one path the split changes nothing here; an unknown split is refused."""
    spec = CorpusSpec(path=write(tmp_path / "a.txt", "x"))
    assert explicit_splits(spec) == ()
    assert list(read_documents(spec, "test")) == ["x"]
    with pytest.raises(CorpusError, match=r"unknown split 'tests'\. Did you mean 'test'\?"):
        list(read_documents(spec, "tests"))


def test_missing_field_names_file_and_row(tmp_path: Path) -> None:
    """The row without the field is named, with the fields it has."""
    path = write(tmp_path / "a.jsonl", {"abstract": "x"}, {"abstracts": "y"})
    with pytest.raises(CorpusError) as caught:
        list(read_documents(CorpusSpec(path=path, text="abstract")))
    assert str(caught.value).startswith(f"{path}, line 2 has no field 'abstract'. Did you mean 'abstracts'?")


def test_half_surrogates_follow_the_errors_option(tmp_path: Path) -> None:
    """JSON can spell what is not text; it is refused, replaced or left out as the spec says."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    with pytest.raises(CorpusError, match=r"line 1 holds half a surrogate pair, U\+D800.*set errors: replace"):
        list(read_documents(CorpusSpec(path=str(path))))
    assert list(read_documents(CorpusSpec(path=str(path), errors="replace"))) == ["a\ufffdb \U0001f600"]
    assert list(read_documents(CorpusSpec(path=str(path), errors="ignore"))) == ["ab \U0001f600"]


def test_encoding_is_passed_on(tmp_path: Path) -> None:
    """Files are decoded as the spec says."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    assert list(read_documents(CorpusSpec(path=str(path), encoding="latin-1"))) == ["café"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"path": "gone.txt"}, "does not exist"),
        ({"path": "a.jsonl", "text": "{"}, "is not a template"),
        ({"path": "a.jsonl", "text": "gone"}, "has no field 'gone'"),
        ({"path": "a.jsonl", "encoding": "utf-9"}, "encoding: 'utf-9' is not known"),
        ({"path": "b.txt", "text": "abstract"}, "text: names abstract, but b.txt is plain text without fields"),
        ({"calibration": "a.jsonl", "test": "gone.txt"}, "gone.txt does not exist"),
        ({"calibration": "a.jsonl", "test": "two.jsonl"}, "two.jsonl, line 1 has no field 'text'"),
    ],
)
def test_check_finds_mistakes_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], fragment: str
) -> None:
    """Every path of every split, the template, the encoding and the first record are looked at."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"text": "x"}, {"broken": "y", "later": "z"})
    write(tmp_path / "b.txt", "x")
    write(tmp_path / "two.jsonl", {"a": "x", "b": "y"})
    with pytest.raises(CorpusError) as caught:
        check_sources(CorpusSpec(**options))  # type: ignore[arg-type]
    assert fragment in str(caught.value)


def test_check_reads_no_further_than_the_first_document(tmp_path: Path) -> None:
    """What is wrong with later records is left to the reading."""
    path = write(tmp_path / "a.jsonl", {"text": "x"}, {"broken": 1})
    check_sources(CorpusSpec(path=path))
    with pytest.raises(CorpusError, match="line 2 has no field 'text'"):
        list(read_documents(CorpusSpec(path=path)))


def test_data_sets_are_streamed(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """Name, config and split are passed on, and rows go through the template."""
    calls = hub([{"q": "a"}, {"q": None}, {"q": "b"}])
    spec = CorpusSpec(dataset="org/set", config="small", dataset_split="test", text="<{q}>")
    assert list(read_documents(spec)) == ["<a>", "<>", "<b>"]
    check_sources(spec)
    assert calls == [("org/set", "small", "test", True)] * 2


def test_data_set_rows_are_named(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """A row of a data set that cannot be used is named with data set and split."""
    hub([{"text": "a"}, {"q": "b", "r": "c"}])
    with pytest.raises(CorpusError, match=r"data set org/set, split train, row 2 has no field 'text'"):
        list(read_documents(CorpusSpec(dataset="org/set")))


@pytest.mark.parametrize("error", [ConnectionError("no route."), FileNotFoundError("no such set"), RuntimeError("odd")])
def test_data_sets_that_cannot_be_had(hub: Callable[[Any], list[tuple[Any, ...]]], error: Exception) -> None:
    """Any failure outside is reported with what was tried, why it failed and what to do."""
    hub(error)
    with pytest.raises(UnavailableError) as caught:
        check_sources(CorpusSpec(dataset="org/set", config="small"))
    message = str(caught.value)
    assert message.startswith("data set org/set (config small), split train could not be had: ")
    assert f"{type(error).__name__}: {str(error).rstrip('.')}. Check the name and the connection" in message
    assert "give its files in path:." in message


def test_a_connection_lost_half_way_is_reported(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """A stream that breaks after some rows is an error, not a shorter corpus."""

    def broken() -> Iterator[Any]:
        yield {"text": "a"}
        raise ConnectionError("reset")

    hub(broken())
    documents = read_documents(CorpusSpec(dataset="org/set"))
    assert next(documents) == "a"
    with pytest.raises(UnavailableError, match="reset"):
        next(documents)


def test_data_set_options_that_cannot_be(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """A config or split that the data set does not have is the recipe's mistake."""
    hub(ValueError("Bad split: trian"))
    with pytest.raises(CorpusError, match=r"cannot be read: Bad split: trian\. Correct dataset:, config: or"):
        list(read_documents(CorpusSpec(dataset="org/set")))


def test_a_local_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ``datasets`` reads a folder of files that is given as data set."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set/train.jsonl", {"text": "a"}, {"text": "b"})
    assert list(read_documents(CorpusSpec(dataset=str(tmp_path / "set")))) == ["a", "b"]
