"""Where dictionaries lie: every form of a name, the hub's cache, and which files are fetched."""

import logging
import os
import time
from pathlib import Path

import pytest
import torch

import circuitsae
from tests.hub import HubServer, cache_repository, commit_of, files_of, use_cache
from transcoders import list_dictionaries, load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.source import HubFolder, LocalFolder, fetch_one, hub_source, open_source

# names


@pytest.mark.parametrize(
    ("name", "repo", "revision", "path"),
    [
        ("org/repo", "org/repo", None, ""),
        ("org/repo@v2", "org/repo", "v2", ""),
        ("org/repo/", "org/repo", None, ""),
        ("org/repo/sub/folder", "org/repo", None, "sub/folder"),
        ("org/repo//sub//folder/", "org/repo", None, "sub/folder"),
        ("org/repo@v2/sub/folder", "org/repo", "v2", "sub/folder"),
        ("org/repo/sub/folder@v2", "org/repo", "v2", "sub/folder"),
        ("org/repo/layer_0.safetensors", "org/repo", None, "layer_0.safetensors"),
        ("hf://org/repo", "org/repo", None, ""),
        ("hf://org/repo@v2/sub", "org/repo", "v2", "sub"),
        ("hf://org/repo/sub?revision=v2", "org/repo", "v2", "sub"),
        ("org-1/re.po_2", "org-1/re.po_2", None, ""),
        ("org/repo@refs/pr/7/sub", "org/repo", "refs/pr/7", "sub"),
        ("gemma", "mwhanna/gemma-scope-transcoders", None, ""),
        ("llama", "mntss/transcoder-Llama-3.2-1B", None, ""),
        ("llama@v2", "mntss/transcoder-Llama-3.2-1B", "v2", ""),
    ],
)
def test_names_of_the_hub(name, repo, revision, path):
    source = open_source(name)
    assert isinstance(source, HubFolder)
    assert (source.repo, source.revision, source.path) == (repo, revision, path)


def test_a_revision_may_be_given_beside_the_name():
    assert hub_source("org/repo", "v2") == hub_source("org/repo@v2") == hub_source("org/repo@v2", "v2")


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("org/repo@v1", "v2", r"two revisions \(v1, v2\)"),
        ("org/repo@v1/sub?revision=v3", None, r"two revisions \(v1, v3\)"),
        ("org/repo/../../etc", None, r"leads out of its repository by '\.\.'"),
        ("./nowhere", None, "There is no folder nowhere; give a folder"),
        ("/nowhere/at/all", None, "There is no folder /nowhere/at/all"),
        ("~/nowhere-at-all", None, "There is no folder"),
        (Path("org/repo"), None, "There is no folder org/repo"),
        ("C:\\dictionaries", None, "There is no folder"),
        ("one-word", None, "it is no hub name"),
        ("org/repo name", None, "it is no hub name"),
        ("-org/repo", None, "it is no hub name"),
        ("", None, r"name of the dictionaries is empty \(''\)"),
        (Path(), "v2", r"\. lies on this machine, where there is no revision 'v2'; leave the revision out"),
        ("org/repo@", None, "it is no hub name"),
        ("https://huggingface.co/org/repo", None, "it is no hub name"),
    ],
)
def test_names_that_are_none_are_refused_in_a_sentence(name, revision, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path)
    with pytest.raises(FileFormatError, match=says) as raised:
        load_dictionaries(name, revision=revision)
    assert "\n" not in str(raised.value)


# on this machine


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "d"
    save_dictionaries(random_dictionaries("plt", n_layers=2, d_model=8, features=12), folder, format="circuit-tracer")
    return folder


def same(found, folder):
    expected, reads = load_dictionaries(folder), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    return torch.equal(found.encode(reads).value, expected.encode(reads).value)


def test_a_folder_of_this_machine_comes_before_a_name_of_the_hub(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "repo").symlink_to(saved)
    assert isinstance(open_source("org/repo"), LocalFolder)
    assert same(load_dictionaries("org/repo"), saved)


def test_a_folder_names_its_files_from_its_root(tmp_path):
    for name in ("b/c.txt", "a.txt", ".hidden", ".git/config", "b/.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    folder = open_source(tmp_path)
    assert folder.names == ("a.txt", "b/c.txt")
    assert folder.below("b").names == ("c.txt",)
    assert folder.below("b/c.txt").names == ("c.txt",)
    assert folder.below("b/c.txt").label == str(tmp_path / "b" / "c.txt")
    with pytest.raises(FileFormatError, match=r"There is no file .*d\.txt; the folder is incomplete"):
        folder.fetch(["d.txt"])


def test_what_may_not_be_looked_at_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "shut").symlink_to(tmp_path / "elsewhere")
    stat = os.stat

    def refuse(path, *args, **how):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return stat(path, *args, **how)

    monkeypatch.setattr(os, "stat", refuse)
    assert open_source(tmp_path).names == ("a.txt",)


def test_a_device_that_is_none_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match=r"The device 'zzz' cannot be used here \(.*give 'auto' or 'cpu'"):
        load_dictionaries("nowhere", device="zzz")


def test_an_argument_that_is_none_is_refused(saved):
    with pytest.raises(TypeError, match="unexpected keyword argument 'lazers'"):
        circuitsae.load_dictionaries(saved, lazers=3)  # pyright: ignore[reportCallIssue]


def test_a_file_is_a_source_of_its_own(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "b.safetensors").write_bytes(b"")
    source = open_source(tmp_path / "a.safetensors")
    assert source.names == ("a.safetensors",)
    assert fetch_one(source, "a.safetensors") == tmp_path / "a.safetensors"


def test_a_folder_of_endless_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transcoders.formats.source.MOST_FILES", 3)
    for i in range(5):
        (tmp_path / f"{i}").write_text("")
    with pytest.raises(FileFormatError, match="more than 3 files; give the folder inside"):
        _ = open_source(tmp_path).names


# in the cache


def test_offline_the_cache_is_used_and_said_to_be(tmp_path, monkeypatch, saved, caplog):
    use_cache(monkeypatch, tmp_path)
    snapshot = cache_repository(tmp_path, "org/repo", saved)
    with caplog.at_level(logging.WARNING):
        assert same(load_dictionaries("org/repo"), saved)
    assert [record.getMessage() for record in caplog.records if "org/repo" in record.getMessage()] == [
        f"org/repo comes from this machine's cache, revision {snapshot.name[:12]}, for the hub cannot be asked "
        "(HF_HUB_OFFLINE is set)."
    ]


def test_offline_a_folder_and_a_revision_are_found(tmp_path, monkeypatch, saved):
    use_cache(monkeypatch, tmp_path)
    other = random_dictionaries("plt", n_layers=2, d_model=8, features=12, seed=9)
    save_dictionaries(other, tmp_path / "other", format="circuit-tracer")
    cache_repository(tmp_path, "org/repo", {f"sub/{name}": content for name, content in files_of(saved).items()})
    snapshot = cache_repository(tmp_path, "org/repo", tmp_path / "other", revision="v2")
    assert same(load_dictionaries("org/repo/sub"), saved)
    assert same(load_dictionaries("org/repo@v2"), tmp_path / "other")
    assert same(load_dictionaries("org/repo", revision="v2"), tmp_path / "other")
    assert same(load_dictionaries(f"org/repo@{snapshot.name}"), tmp_path / "other")
    for name, says in (
        ("org/repo@v3", r"'org/repo@v3' are not on this machine, and the hub cannot be asked"),
        ("org/nothing", r"'org/nothing' are not on this machine"),
        ("org/repo/sup", r"has nothing at 'sup' in this machine's cache; its files lie in sub"),
    ):
        with pytest.raises(FileFormatError, match=says):
            load_dictionaries(name)


def test_offline_a_file_that_was_not_downloaded_is_named(tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path)
    save_dictionaries(random_dictionaries("sae"), tmp_path / "saved")
    cache_repository(tmp_path, "org/repo", {"config.json": (tmp_path / "saved" / "config.json").read_bytes()})
    says = r"org/repo has no file weights\.safetensors in this machine's cache; load it once with the network"
    with pytest.raises(FileFormatError, match=says):
        load_dictionaries("org/repo")


# from the hub


@pytest.fixture
def hub(tmp_path, monkeypatch, saved):
    """A server with one repository: two sets in folders, what else lies there, and another revision."""
    files = files_of(saved)
    sets = {f"{folder}/{name}": content for folder in ("one", "two [b]") for name, content in files.items()}
    main = {"README.md": b"# hello", "big.bin": bytes(10_000), **sets}
    with HubServer({"org/repo": {"main": main, "v2": files}}) as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def test_only_what_is_needed_is_fetched(hub, saved):
    assert same(load_dictionaries("org/repo/one"), saved)
    assert hub.fetched == {f"one/{name}" for name in files_of(saved)}


def test_a_folder_with_the_letters_of_a_pattern_is_fetched_as_it_is(hub, saved):
    assert same(load_dictionaries("org/repo/two [b]"), saved)
    assert hub.fetched == {f"two [b]/{name}" for name in files_of(saved)}


def test_a_revision_is_fetched(hub, saved):
    assert same(load_dictionaries("org/repo@v2"), saved)
    assert hub.fetched == set(files_of(saved))
    commit = commit_of(hub.repositories["org/repo"]["v2"])
    assert any(f"/resolve/{commit}/" in asked for asked in hub.asked)


def test_listing_fetches_no_weights(hub):
    name, offers = list_dictionaries("org/repo/one")
    assert (name, [offer.layer for offer in offers]) == ("circuit-tracer", [0, 1])
    assert hub.fetched <= {"one/config.yaml"}


def test_what_was_fetched_once_is_there_without_the_network(hub, tmp_path, monkeypatch, saved, caplog):
    """Though the cache knows that it holds a part of the repository."""
    load_dictionaries("org/repo/one")
    asked = len(hub.asked)
    use_cache(monkeypatch, tmp_path / "cache")
    assert same(load_dictionaries("org/repo/one"), saved)
    assert len(hub.asked) == asked
    with pytest.raises(
        FileFormatError, match=r"has nothing at 'two \[b\]' in this machine's cache; its files lie in one"
    ):
        load_dictionaries("org/repo/two [b]")


def test_nothing_is_fetched_twice(hub, capsys):
    """And the client draws its bars only where it fetches."""
    load_dictionaries("org/repo/one")
    assert "Fetching" in capsys.readouterr().err
    files = [path for path in hub.asked if path.startswith("GET") and "/resolve/" in path]
    assert len(files) == len(set(files))
    load_dictionaries("org/repo/one")
    assert capsys.readouterr().err == ""
    assert [path for path in hub.asked if path.startswith("GET") and "/resolve/" in path] == files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "org/nothing",
            r"The hub does not give 'org/nothing' \(there is no such repository, or it is private: then log in with "
            r"`hf auth login`\), and there is no such local folder; check the name",
        ),
        ("org/repo@v3", r"The hub does not give 'org/repo@v3' \(it has no such revision\)"),
        (
            "org/repo/three",
            r"org/repo has nothing at 'three' on the hub; its files lie in README\.md, big\.bin, one, two",
        ),
        ("org/repo/README.md", r"org/repo/README\.md holds no dictionaries in a known format"),
    ],
)
def test_what_the_hub_does_not_have_is_said(hub, name, says):
    start = time.monotonic()
    with pytest.raises(FileFormatError, match=says) as raised:
        load_dictionaries(name)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 20


def test_a_repository_that_is_gated_is_said_to_be(hub, monkeypatch):
    def gated(self, request, *, with_body):
        request.send_response(403)
        request.send_header("X-Error-Code", "GatedRepo")
        request.send_header("Content-Length", "0")
        request.end_headers()

    answer = HubServer.answer
    monkeypatch.setattr(
        HubServer,
        "answer",
        lambda self, request, **how: (answer if request.path == "/" else gated)(self, request, **how),
    )
    with pytest.raises(
        FileFormatError, match="it is gated: ask for access on its page, then log in with `hf auth login`"
    ):
        load_dictionaries("org/repo/one")


def test_a_server_that_breaks_off_is_said(hub, monkeypatch, saved):
    answer = HubServer.answer

    def broken(self, request, *, with_body):
        if (with_body and "W_enc" in request.path) or "layer_1" in request.path:
            self.asked.append(request.path)
            request.send_response(403)
            request.send_header("Content-Length", "0")
            request.end_headers()
        else:
            answer(self, request, with_body=with_body)

    monkeypatch.setattr(HubServer, "answer", broken)
    with pytest.raises(FileFormatError, match=r"Could not download .* of 'org/repo/one' \(.*\); check the name"):
        load_dictionaries("org/repo/one")


def test_two_sets_of_one_repository_are_told_apart(hub):
    with pytest.raises(
        InputError, match=r"more than one variant \(one, two \[b\]\); say which with variant=… \(--variant\)"
    ):
        load_dictionaries("org/repo")
    assert hub.fetched <= {"one/config.yaml", "two [b]/config.yaml"}
