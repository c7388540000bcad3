"""Putting a model on the hub: what goes up and what never does, checks before anything is sent, and the sending."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from secateur.errors import CheckpointError, ConfigError, ExportError, UnavailableError
from secateur.export.hub import plan_upload, push, without_paths
from tests.hub_server import HubServer, hub_server
from tests.pico import save_model_folder

REPO = "me/pico-medical"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; nobody changes it."""
    return save_model_folder(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server() as server:
        yield server


def write_card(folder: Path, metadata: str, text: str = "") -> None:
    """Replace the model card."""
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Model\n{text}\n", encoding="utf-8")


def test_only_what_belongs_to_the_model_goes_up(folder: Path) -> None:
    """Statistics, recipes, other people's files, folders and unnamed code stay, whatever they are called."""
    for name in ("recipe.yml", "evaluation.json", ".env", "train.py", "notes.txt", "optimizer.bin", "x.safetensors"):
        (folder / name).write_bytes(b"{}")
    (folder / "x.safetensors").unlink()
    (folder / "statistics").mkdir()
    (folder / "LICENSE.d").mkdir()
    upload = plan_upload(folder, REPO)
    names = {"LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in upload.files} == names | {"tokenizer.json", "tokenizer_config.json"}
    left = {
        "recipe.yml",
        "evaluation.json",
        ".env",
        "train.py",
        "notes.txt",
        "optimizer.bin",
        "statistics",
        "LICENSE.d",
    }
    assert set(upload.left_out) == left
    assert upload.size_bytes == sum((folder / file.name).stat().st_size for file in upload.files)


def test_code_goes_up_if_the_configuration_names_it(folder: Path) -> None:
    """The class of a model whose layers differ does; a script beside it does not; nor what another repository holds."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_x.Config", "AutoModel": ["modeling_x.Model", None], "A": "o/r--y.Z"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_x.py", "y.py", "other.py"):
        (folder / name).write_text("")
    assert {file.name for file in plan_upload(folder, REPO).files if file.name.endswith(".py")} == {"modeling_x.py"}


def test_paths_of_this_machine_do_not_go_up(folder: Path) -> None:
    """In JSON they become their last part and the folder here stays as it is; in the card they are pointed out."""
    plan = {"provenance": {"model": "/home/me/secret/llama", "versions": {"torch": "2"}}, "notes": ["a/b"]}
    (folder / "secateur_plan.json").write_text(json.dumps(plan))
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "/data/models/llama"}
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder, "license: mit", "See /home/me/notes.txt; path/to/this/folder")
    upload = plan_upload(folder, REPO)
    sent = {file.name: file.source for file in upload.files if isinstance(file.source, bytes)}
    assert json.loads(sent["secateur_plan.json"]) == {
        **plan,
        "provenance": {"model": "llama", "versions": {"torch": "2"}},
    }
    assert json.loads(sent["config.json"])["_name_or_path"] == "llama"
    assert f"; {REPO}" in sent["README.md"].decode(), "the lines to paste name the repository"
    assert "README.md shows a path of this machine: /home/me/notes.txt;" in upload.notes
    assert len(upload.notes) == 3
    assert "/home/me/secret" in (folder / "secateur_plan.json").read_text()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("_name_or_path", "/a/b", "b"),
        ("model", "C:\\\\models\\\\x", "x"),
        ("tokenizer_file", "~/t/", "t"),
        ("model", "org/name", "org/name"),
        ("pattern", "/a/b", "/a/b"),
        ("chat_template", "/{{x}}/y", "/{{x}}/y"),
        ("model_type", "/a/b", "/a/b"),
    ],
)
def test_a_path_is_known_by_its_key_and_its_root(key: str, value: str, expected: str) -> None:
    """Tokens, templates and hub ids with slashes stay as they are."""
    assert without_paths({"deep": [{key: value}]}) == {"deep": [{key: expected}]}


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "a" * 34, "-----BEGIN RSA PRIVATE KEY-----", "AKIA" + "A" * 16, "sk-" + "b" * 40, "ghp_" + "c" * 36],
)
def test_a_secret_stops_everything(folder: Path, secret: str) -> None:
    """It is named by file, line and kind, and not repeated."""
    write_card(folder, "license: mit", f"first\ntoken: {secret}")
    with pytest.raises(
        ExportError, match=r"README.md, line 6, holds what looks like an? .*Take it out first"
    ) as caught:
        plan_upload(folder, REPO)
    assert secret not in str(caught.value)


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "me/..", "me/x--y", "me/a b", "me/x.git"])
def test_a_repository_must_have_a_possible_name(source: Path, repo_id: str) -> None:
    """Said before anything else is looked at."""
    with pytest.raises(ConfigError, match=r"no name of a hub repository.*Give owner/name"):
        plan_upload(source, repo_id)


def test_a_repository_needs_its_owner(source: Path) -> None:
    """A bare name would go to whoever is logged in."""
    with pytest.raises(ConfigError, match="has no owner"):
        plan_upload(source, "pico")


def test_a_card_with_a_licence_is_needed(folder: Path) -> None:
    """Without one nobody may use the model."""
    write_card(folder, "language: en")
    with pytest.raises(ExportError, match=r"states no licence.*write `license: \.\.\.`"):
        plan_upload(folder, REPO)
    (folder / "README.md").unlink()
    with pytest.raises(ExportError, match="has no model card"):
        plan_upload(folder, REPO)


def test_the_model_must_be_whole(folder: Path) -> None:
    """A missing weight, shard, or tokenizer is found before anything is sent."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: "model-00002-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002.safetensors, which its index names"):
        plan_upload(folder, REPO)
    index.unlink()
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks 1 weights, the first {name}"):
        plan_upload(folder, REPO)
    save_file(weights, folder / "model.safetensors")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError):
        plan_upload(folder, REPO)


def test_ggufs_go_up_beside_it(source: Path, tmp_path: Path) -> None:
    """Under their own names; what is no GGUF file, or would replace another file, is refused."""
    good, bad = tmp_path / "a.gguf", tmp_path / "b.gguf"
    good.write_bytes(b"GGUF rest")
    bad.write_bytes(b"PK\3\4")
    assert plan_upload(source, REPO, ggufs=[good]).files[-1].name == "a.gguf"
    with pytest.raises(CheckpointError, match="is no GGUF file: it starts with b'PK"):
        plan_upload(source, REPO, ggufs=[bad])
    with pytest.raises(CheckpointError, match="cannot be read"):
        plan_upload(source, REPO, ggufs=[tmp_path / "none.gguf"])
    with pytest.raises(ConfigError, match=r"two files would be called a\.gguf"):
        plan_upload(source, REPO, ggufs=[good, good])


def test_what_a_licence_asks_is_checked_and_partly_done(folder: Path) -> None:
    """The notice is added; the name and the licence's text are asked for."""
    write_card(folder, "license: llama3.2\nbase_model: meta-llama/Llama-3.2-1B")
    upload = plan_upload(folder, REPO)
    notice = next(file for file in upload.files if file.name == "Notice")
    assert isinstance(notice.source, bytes) and b"Llama 3.2 is licensed under" in notice.source
    assert upload.unmet == ("the repository's name must begin with \"Llama\", and 'pico-medical' does not",)
    (folder / "LICENSE").unlink()
    (folder / "NOTICE.txt").write_text("notice")
    upload = plan_upload(folder, "me/Llama-medical")
    assert [duty.split(";")[0] for duty in upload.unmet] == ["no file with the licence's text lies in the folder"]
    assert "Notice" not in [file.name for file in upload.files]


def test_a_model_arrives_in_one_commit(source: Path, hub: HubServer) -> None:
    """The repository is made, and holds afterwards exactly what was planned."""
    upload = plan_upload(source, REPO)
    url = push(upload, private=True, api=hub.api())
    assert url == f"{hub.address}/{REPO}/commit/{'1' * 40}"
    assert hub.private == {REPO: True} and not hub.branches
    assert set(hub.files[REPO]) == {".gitattributes", *(file.name for file in upload.files)}
    assert hub.files[REPO]["model.safetensors"] == (source / "model.safetensors").read_bytes()
    assert len([call for call in hub.calls if "/commit/" in call]) == 1


def test_weights_of_an_earlier_upload_go(source: Path, hub: HubServer) -> None:
    """A loader would take them for this model's; GGUF files and texts stay, also on another branch."""
    hub.private[REPO] = False
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    hub.files[REPO] = dict.fromkeys((*old, "old.Q8_0.gguf", "notes.md"), b"")
    push(plan_upload(source, REPO), revision="v2", api=hub.api())
    assert hub.branches == ["v2"]
    assert not set(old) & set(hub.files[REPO]) and {"old.Q8_0.gguf", "notes.md"} <= set(hub.files[REPO])


def test_private_is_never_sent_to_a_public_repository(source: Path, hub: HubServer) -> None:
    """The hub would ignore the wish silently where the repository exists."""
    hub.private[REPO], hub.files[REPO] = False, {}
    with pytest.raises(ExportError, match=r"exists and is public.*Nothing was sent"):
        push(plan_upload(source, REPO), private=True, api=hub.api())
    assert not hub.files[REPO]


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "may not write to"), (413, "hub refused")])
def test_refusals_say_what_to_do(source: Path, hub: HubServer, status: int, words: str) -> None:
    """By what the hub answered."""
    hub.refuse = status
    with pytest.raises(UnavailableError, match=words):
        push(plan_upload(source, REPO), api=hub.api())


def test_who_is_not_logged_in_is_told_how(source: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token nothing is asked of the hub, and a wrong one is named as such."""
    upload = plan_upload(source, REPO)
    with pytest.raises(UnavailableError, match="does not accept your token"):
        push(upload, api=hub.api("wrong"))
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    hub.calls.clear()
    api: Any = hub.api()
    api.token = None
    with pytest.raises(UnavailableError, match=r"not logged in to the hub\. Run `hf auth login`, or set HF_TOKEN"):
        push(upload, api=api)
    assert not hub.calls


def test_a_hub_that_is_not_there_is_said_to_be_away(source: Path) -> None:
    """As one line, not as a stack of somebody else's errors."""
    with hub_server() as gone:
        api = gone.api()
    with pytest.raises(UnavailableError, match="could not be reached"):
        push(plan_upload(source, REPO), api=api)
