"""Dictionaries on the hub: what is sent, the card that describes them, and what is said where the hub refuses."""

import re
from pathlib import Path

import pytest
import yaml

from circuitsae.cli import main
from transcoders import random_dictionaries, save_dictionaries, upload_dictionaries
from transcoders.dictionaries import DictionaryProvenance
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.upload import model_card


@pytest.fixture
def hub(monkeypatch):
    """What the hub's client is asked to do."""
    sent = []

    class Api:
        def __init__(self, **how):
            sent.append(("log in", how))

        def create_repo(self, repo, **how):
            sent.append(("create", repo, how))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, **how):
            sent.append(("folder", how))

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **how):
            sent.append(("file", repo_id, path_in_repo, path_or_fileobj.decode()))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("transcoders.formats.upload.hub_problem", lambda: None)
    return sent


@pytest.fixture
def folder(tmp_path):
    made = random_dictionaries("plt", n_layers=3, d_model=8, features=1200, activation="topk", k=5, skip=True)
    made.provenance = DictionaryProvenance(
        model="openai-community/gpt2", corpus="a | text\n<script>", tokens=2_000_000, bos=False, fingerprint="abc"
    )
    save_dictionaries(made, tmp_path / "d")
    return tmp_path / "d"


def test_the_folder_and_its_card_are_sent(hub, folder):
    assert upload_dictionaries(folder, "me/mine", private=True, token="t") == "https://huggingface.co/me/mine"
    login, create, whole, card = hub
    assert login == ("log in", {"token": "t"})
    assert create == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert (whole[1]["repo_id"], whole[1]["folder_path"]) == ("me/mine", folder)
    assert card[:3] == ("file", "me/mine", "README.md")
    assert card[3] == model_card(folder, "me/mine")


def test_checkpoints_and_hidden_files_stay_here(hub, folder):
    from huggingface_hub.utils import filter_repo_objects

    upload_dictionaries(folder, "me/mine")
    names = [
        "config.json",
        "weights.safetensors",
        "cards/layer_0.npz",
        ".cache/x",
        "a/.b",
        "checkpoint-00000010/state.pt",
    ]
    kept = filter_repo_objects(names, ignore_patterns=hub[2][1]["ignore_patterns"])
    assert list(kept) == ["config.json", "weights.safetensors", "cards/layer_0.npz"]


def test_the_card_says_what_they_are_and_how_they_load(folder):
    card = model_card(folder, "me/mine")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head) == {
        "tags": ["mechanistic-interpretability", "circuitsae", "transcoder"],
        "base_model": "openai-community/gpt2",
    }
    facts = dict(re.findall(r"^\| (.+?) \| (.+) \|$", body, re.MULTILINE))
    assert facts == {
        "kind": "plt", "model": "openai-community/gpt2", "layers": "0–2", "reads": "mlp_in", "writes": "mlp_out",
        "d_model": "8", "features of a layer": "1,200", "activation": "topk (k = 5)", "skip": "True", "frame": "raw",
        "corpus": "a text script", "training tokens": "2000000", "BOS": "False", "weights of the model": "abc",
        "format": "native",
    }  # fmt: skip
    assert 'load_dictionaries("me/mine")' in body
    assert "# mine" in body


def test_what_a_run_says_of_itself_follows_the_card(hub, folder):
    (folder / "README.md").write_text("# sae of vectors, finished")
    upload_dictionaries(folder, "me/mine")
    assert hub[-1][-1].startswith("---")
    assert hub[-1][-1].endswith("# sae of vectors, finished")


def test_a_card_that_is_there_is_kept(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    upload_dictionaries(folder, "me/mine")
    assert [each[0] for each in hub] == ["log in", "create", "folder"]


def test_the_command_says_where_they_are(hub, folder, capsys):
    main(["dictionaries", "upload", str(folder), "me/mine", "--private"])
    assert "Uploaded: https://huggingface.co/me/mine" in capsys.readouterr().out
    assert hub[1][2]["private"] is True


@pytest.mark.parametrize("repo", ["mine", "me/", "me/mine/more", "me mine/x", "", "/x", "../x"])
def test_a_name_that_is_none_is_refused(hub, folder, repo):
    with pytest.raises(InputError, match="is no name of a repository; give OWNER/NAME"):
        upload_dictionaries(folder, repo)
    assert hub == []


def test_what_are_no_sound_dictionaries_is_not_sent(hub, folder, tmp_path):
    with pytest.raises(FileFormatError, match="There is no folder"):
        upload_dictionaries(tmp_path / "nowhere", "me/mine")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        upload_dictionaries(folder, "me/mine")
    assert hub == []


def test_the_hubs_refusal_is_a_sentence(hub, folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 Client Error.\nTry again.")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(
        InputError, match=r"The hub refused 'me/mine' \(401 Client Error\.\); log in with `hf auth login`"
    ):
        upload_dictionaries(folder, "me/mine")


def test_without_a_network_nothing_is_tried(folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as left:
        main(["dictionaries", "upload", str(folder), "me/mine"])
    assert left.value.code == 2
    assert "Nothing was uploaded, for the hub cannot be asked (HF_HUB_OFFLINE is set)" in capsys.readouterr().err


def test_without_a_token_the_real_client_is_refused_in_a_sentence(folder, monkeypatch, tmp_path):
    """By a server that answers as the hub does to strangers."""
    from tests.hub import HubServer

    with HubServer({}) as server:
        server.use(monkeypatch, tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(Path(tmp_path) / "none"))
        with pytest.raises(InputError, match=r"The hub refused 'me/mine' \(.*\); log in with `hf auth login`"):
            upload_dictionaries(folder, "me/mine")
