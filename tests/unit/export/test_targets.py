"""Export targets: what each can hold is known before anything is written, and a name is given last."""

from __future__ import annotations

import errno
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import ConfigError, ExportError, UnavailableError, VerificationError
from secateur.export import export_huggingface, gguf_types, llama_cpp
from secateur.export.llama_cpp import Verification
from secateur.export.targets import TARGETS, Options, export_folder, read_facts
from secateur.families.loader import families
from secateur.records.exported import Exported
from tests.command import environment
from tests.conftest import geometry_of
from tests.pico import save_model_folder
from tests.pruning import plan_keeping, prune
from tests.unit.export.test_gguf import folder_of, uneven_folder

AGREED = Verification("1", 8, 3, 3, 3, 0.001, 0.002, 0.0, 0.02)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path, Sequence[str]]]:
    """Put an engine that agrees in the place of llama.cpp, and return what it was asked."""
    asked: list[tuple[Path, Path, Sequence[str]]] = []

    def verify(file: Path, folder: Path, prompts: Sequence[str]) -> Verification:
        asked.append((file, folder, prompts))
        return AGREED

    monkeypatch.setattr(llama_cpp, "verify_in_llama_cpp", verify)
    return asked


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_target_says_what_it_is(name: str) -> None:
    """In one sentence; its types are its own spelling, the first one by default."""
    target = TARGETS[name]
    assert target.name == name and target.description.endswith(".")
    for kind in target.types:
        assert target.quantization(kind.lower()) == kind
        assert target.needed_multiple(kind) >= 1
    if target.types:
        assert target.quantization(None) == target.types[0]
    else:
        assert target.quantization(None) == ""
        with pytest.raises(ConfigError, match=f"export target {name} has no types; got quantize: F16"):
            target.quantization("F16")


def test_gguf_has_the_types_that_the_writer_has() -> None:
    """Float16 first; quantised rows are whole blocks, and uneven widths should be, whatever the type."""
    target = TARGETS["gguf"]
    assert target.types[0] == "F16" and sorted(target.types) == sorted(gguf_types.QUANTIZATIONS)
    assert [target.needed_multiple(kind) for kind in ("F16", "BF16", "F32", "Q8_0", "Q4_0")] == [1, 1, 1, 32, 32]
    assert [target.advised_multiple(kind, True, 2048) for kind in ("F16", "Q8_0")] == [32, 32]
    assert target.advised_multiple("F16", False, 2048) == 1


def test_k_quants_want_whole_blocks_of_256_where_there_is_room() -> None:
    """They take 32 everywhere; a width of few blocks, or of no whole ones, stays as fine as for other types."""
    target = TARGETS["gguf"]
    for uneven in (False, True):
        found = [target.advised_multiple("Q4_K_M", uneven, width) for width in (96, 1536, 2048, 2080, 8192)]
        assert found == [32, 32, 256, 32, 256]
    assert target.needed_multiple("Q6_K") == 32


def test_what_a_type_needs_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """K-quants need llama.cpp's library, and other types nothing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    TARGETS["gguf"].require_installed("Q8_0")
    with pytest.raises(UnavailableError, match=r"k-quants are written by llama.cpp's own library, .* pip install"):
        TARGETS["gguf"].require_installed("Q4_K_M")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    """A type as well as a target."""
    with pytest.raises(ConfigError, match=r"unknown export target 'guff'. Did you mean 'gguf'"):
        export_folder(Path("nowhere"), to="guff")
    with pytest.raises(ConfigError, match=r"unknown type of export target gguf 'Q4_KM'. Did you mean 'Q4_K_M'"):
        export_folder(Path("nowhere"), quantize="Q4_KM")


def test_the_name_is_given_after_the_engine_agreed(tmp_path: Path, engine: Any) -> None:
    """It is asked about a file without that name; the record says how far it agreed, and survives JSON."""
    folder = folder_of(tmp_path, "llama")
    target = tmp_path / "out" / "a.gguf"
    seen: list[bool] = []

    def verify(file: Path, _: Path, prompts: Sequence[str]) -> Verification:
        seen.append(target.exists())
        assert prompts == ["one", "two"] and GGUFReader(file).get_field("general.name").contents() == "mine"
        return AGREED

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "verify_in_llama_cpp", verify)
        made = export_folder(folder, target, quantize="Q8_0", name="mine", prompts=["one", " ", "two"])
    assert seen == [False] and target.is_file()
    assert (made.target, made.quantization, made.form) == ("gguf", "Q8_0", "llama, Q8_0")
    assert made.size_bytes == target.stat().st_size
    assert "3 of 3 prompts" in made.verified and made.not_verified == ""
    assert made.facts["verified"]["mean_difference"] == 0.001
    assert Exported.from_dict(made.to_dict()) == made
    assert export_folder(folder, verify=False).path == tmp_path / "model.F16.gguf"
    assert [file.name for file in target.parent.iterdir()] == ["a.gguf"]


def test_a_later_success_takes_the_failed_file_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is kept beside the name until the same export succeeds."""
    folder, failed = folder_of(tmp_path, "llama"), tmp_path / "a.failed-verification.gguf"

    def refuse(*_: object) -> None:
        raise VerificationError("llama.cpp answers otherwise.")

    monkeypatch.setattr(llama_cpp, "verify_in_llama_cpp", refuse)
    with pytest.raises(VerificationError, match=r"answers otherwise. The file is kept as .*a.failed-verification.gguf"):
        export_folder(folder, tmp_path / "a.gguf")
    assert failed.is_file() and not (tmp_path / "a.gguf").exists()
    monkeypatch.setattr(llama_cpp, "verify_in_llama_cpp", lambda *_: AGREED)
    export_folder(folder, tmp_path / "a.gguf")
    assert not failed.exists() and (tmp_path / "a.gguf").is_file()


def test_without_the_engine_the_file_is_kept_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read back; nothing more is claimed."""

    def absent(*_: object) -> None:
        raise UnavailableError("llama.cpp is not installed. Run: pip install xllamacpp")

    monkeypatch.setattr(llama_cpp, "verify_in_llama_cpp", absent)
    made = export_folder(folder_of(tmp_path, "llama"), tmp_path / "a.gguf")
    assert made.verified == "" and made.facts["verified"] is None
    assert made.sentences()[-1] == ("not verified in an engine: llama.cpp is not installed. Run: pip install xllamacpp")


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else; the file is named in the message."""
    folder, target = folder_of(tmp_path, "llama"), tmp_path / "out" / "a.gguf"
    target.parent.mkdir()
    target.write_bytes(b"earlier")

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_ti_data_to_file", no_space)
    with pytest.raises(ExportError, match=r"the disk is full: .*out/a.gguf could not be written. Free space"):
        export_folder(folder, target)
    assert [file.read_bytes() for file in target.parent.iterdir()] == [b"earlier"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gguf import GGUFWriter
from secateur.export import llama_cpp
from secateur.export.targets import export_folder

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "writing":
    GGUFWriter.write_tensor_data = kill
else:
    llama_cpp.verify_in_llama_cpp = kill
export_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "verifying"])
def test_a_killed_export_leaves_nothing_under_its_name(moment: str, tmp_path: Path) -> None:
    """SIGKILL in the middle of writing, and while the engine is asked."""
    folder = save_model_folder(tmp_path / "model")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, tmp_path / "out" / "a.gguf", moment],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list((tmp_path / "out").iterdir())
    assert left and all(file.name.startswith(".") for file in left)


def test_facts_are_enough_for_every_check(tmp_path: Path) -> None:
    """No weight is read: the same refusals come from a configuration and shapes alone."""
    facts = read_facts(uneven_folder(tmp_path, "llama"))
    TARGETS["gguf"].require_fit(facts, Options("F16"))
    narrow = dict(facts.shapes)
    for part, shape in (("gate", (56, 64)), ("up", (56, 64)), ("down", (64, 56))):
        narrow[f"model.layers.0.mlp.{part}_proj.weight"] = shape
    TARGETS["gguf"].require_fit(type(facts)(facts.config, narrow), Options("F16"))
    with pytest.raises(ExportError, match=r"blk.0.ffn_down.weight have rows of 56 \(nearest that fit: 32 or 64\)"):
        TARGETS["gguf"].plan(type(facts)(facts.config, narrow), Options("Q8_0"))


# -- filling up with zeros -------------------------------------------------------------------------------------------


def narrow_folder(parent: Path, family: str, widths: list[int], **changes: Any) -> Path:
    """Save a model whose layers have other FFN widths each."""
    source = folder_of(parent, family, **changes)
    dense = AutoModelForCausalLM.from_pretrained(source)
    geometry = geometry_of(dense, families()[family])
    plan = plan_keeping(geometry, {"ffn_channel": [list(range(width)) for width in widths]}, "uneven")
    tokenizer = AutoTokenizer.from_pretrained(source)
    target = parent / "narrow"
    export_huggingface(prune(dense, plan, geometry), tokenizer, plan, target, source=source, provenance={})
    return target


def test_widths_that_no_block_holds_are_filled_up(tmp_path: Path, engine: Any) -> None:
    """Refused with the option that helps; with it the layers, the parameters and the bytes are said."""
    folder, target = narrow_folder(tmp_path, "llama", [40, 96, 40, 64]), tmp_path / "out" / "a.gguf"
    with pytest.raises(ExportError, match=r"blk.2.ffn_down.weight have rows of 40 .*Or set round_to_fit: true"):
        export_folder(folder, target, quantize="Q8_0")
    assert not target.parent.exists()
    made = export_folder(folder, target, quantize="Q8_0", round_to_fit=True, prompts=["one"])
    added = 2 * 3 * 24 * 64
    assert made.padding[0].startswith("filled up with zeros: layers 0 2 from 40 to 64 FFN channels: ")
    assert f"{added:,} more parameters" in made.padding[0] and "9.8 kB" in made.padding[0]
    assert GGUFReader(target).get_field("deci.feed_forward_length").contents() == [64, 96, 64, 64]
    assert [file.name for file in target.parent.iterdir()] == ["a.gguf"]
    assert engine[-1][1:] == (folder, ["one"])  # what was not filled up is what the engine is compared with
    assert export_folder(folder, target, quantize="F16", round_to_fit=True).padding == ()


def test_sizes_that_differ_become_the_same_where_the_engine_wants_that(tmp_path: Path, engine: Any) -> None:
    """The stock architecture of the family, with whole blocks, and the same logits."""
    folder, target = narrow_folder(tmp_path, "gemma2", [40, 96, 40, 64, 33, 70]), tmp_path / "out" / "model.gguf"
    with pytest.raises(ExportError, match=r"loads no gemma2 model with layers that differ .*Or set round_to_fit: true"):
        export_folder(folder, target)
    made = export_folder(folder, target, quantize="F32", round_to_fit=True)
    assert made.form == "gemma2, F32" and "layers 0 2 from 40 to 96 FFN channels" in made.padding[0]
    padded, narrow = (
        {tensor.name: tensor.data for tensor in GGUFReader(target).tensors},
        AutoModelForCausalLM.from_pretrained(folder),
    )
    down = narrow.model.layers[4].mlp.down_proj.weight.detach().numpy()
    found = padded["blk.4.ffn_down.weight"]
    assert found.shape == (64, 96) and (found[:, 33:] == 0).all() and (found[:, :33] == down).all()


@pytest.mark.parametrize("name", ["uniform", "nemotron-nas"])
def test_folders_are_written_read_back_and_described(name: str, tmp_path: Path) -> None:
    """Beside the model, named after it and the target."""
    widths = [256, 256, 512, 256]
    folder = narrow_folder(tmp_path, "llama", widths, intermediate_size=512)
    made = export_folder(folder, to=name)
    assert made.path == tmp_path / f"narrow-{name}" and (made.path / "config.json").is_file()
    assert made.size_bytes == sum(file.stat().st_size for file in made.path.rglob("*") if file.is_file())
    assert made.checked and made.verified == made.not_verified == ""
    assert bool(made.padding) == (name == "uniform")


def test_a_folder_is_not_written_over_the_model(tmp_path: Path) -> None:
    """What is exported must stay."""
    folder = save_model_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is the folder that is exported. Choose another output"):
        export_folder(folder, folder, to="uniform")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("llama", "Q8_0"),
        ("llama", "Q4_K_M"),
        ("gemma2", "F32"),
        ("gemma2", "Q5_K_M"),
        ("phi", "Q4_K_S"),
        ("gpt_neox", "F32"),
    ],
)
def test_the_engine_computes_what_the_narrow_model_does(name: str, quantize: str, tmp_path: Path) -> None:
    """Zeros change no answer."""
    widths = [40, 96, 40, 64, 33, 70] if name == "gemma2" else [40, 96, 40, 64]
    made = export_folder(narrow_folder(tmp_path, name, widths), quantize=quantize, round_to_fit=True)
    assert made.padding and " of 6 prompts have the same likeliest next token" in made.verified
    assert quantize != "F32" or "6 of 6 prompts" in made.verified
