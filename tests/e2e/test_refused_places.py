"""A full disk, a folder that may not be written to, a file in the way: one sentence, and the whole result or none."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from circuitsae.cli import main
from circuitsae.features import CollectConfig, collect
from circuitsae.graph.exchange import write_graph
from circuitsae.pocket import dictionary_folder
from tests.sample_graphs import small_graph
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the commands read: a graph, a traced one, an exported one, cards, a text."""
    folder = tmp_path_factory.mktemp("inputs")
    small_graph().save(folder / "graph")
    write_graph(small_graph(), folder / "graph.json")
    main(["trace", PROMPT, "--out", str(folder / "traced"), "--validate", "0"])
    model = random_model("gpt2", n_layers=2, d_model=16, d_vocab=32)
    rows = [[1, 2, 3, 4, 5, 6, 7, 8]] * 12
    dictionaries = random_dictionaries("clt", n_layers=2, d_model=16, features=8)
    settings = CollectConfig(tokens=60, context=8, top=2, logits=3)
    collect(model, dictionaries, torch.tensor(rows), settings, out=folder / "cards")
    (folder / "text.txt").write_text("\n\n".join([PROMPT] * 60))
    return folder


COMMANDS = {
    "trace": ["trace", PROMPT, "--out", "{out}", "--validate", "2"],
    "show": ["show", "{inputs}/graph", "--html", "{out}/page.html"],
    "import": ["import", "{inputs}/graph.json", "--out", "{out}"],
    "export": ["export", "{inputs}/graph", "{out}/graph.gexf"],
    "browse": ["features", "browse", "{inputs}/cards", "--out", "{out}"],
    "collect": [
        *("features", "collect", "pocket", "--dictionaries", str(dictionary_folder("pocket"))),
        *("--corpus", "{inputs}/text.txt", "--tokens", "200", "--context", "16", "--out", "{out}"),
    ],
}


def refused(command: str, inputs: Path, out: Path, capsys) -> str:
    """What the command says; it must end with exit code 2."""
    arguments = [part.format(inputs=inputs, out=out) for part in COMMANDS[command]]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: Cannot write [^\n]*\.\n", said), said
    return said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "is full; make room"), (errno.EROFS, "may not be written to")]
)
def test_a_place_that_refuses(command, number, says, inputs, tmp_path, capsys, monkeypatch):
    written = 0

    def refuse(handle: int) -> None:
        nonlocal written
        written += 1
        if written > 1 or number == errno.EROFS:  # the disk takes one file, and is full
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if command in ("show", "export", "collect"):  # these write one file, or the first is temporary
        written = 1
    assert says in refused(command, inputs, tmp_path / "out", capsys)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    # Pages of features are written one by one, each whole.
    assert not left or (command == "browse" and all(path.suffix == ".html" for path in left)), left


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_where_the_folder_should_be(command, inputs, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    said = refused(command, inputs, tmp_path / "out", capsys)
    assert f"{tmp_path / 'out'} is a file, but a folder is needed there" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_validate_keeps_the_earlier_result(inputs, capsys, monkeypatch):
    folder = inputs / "traced"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(folder), "--edges", "2", "--controls", "1"])
    assert stopped.value.code == 2
    assert "is full" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
