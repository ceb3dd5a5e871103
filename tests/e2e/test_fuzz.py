"""Damaged inputs of every kind: each command ends well with finite content, or with exit code 2 and one sentence.

Each case is a function of its number. `make fuzz` runs more; FUZZ_FIRST=<number> FUZZ_CASES=1 runs one alone.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from circuitsae.cli import main
from circuitsae.commands import shared
from circuitsae.features import CollectConfig, Label, Ledger, collect
from circuitsae.graph import load_graph
from circuitsae.graph.exchange import read_graph, write_graph
from circuitsae.loading import load_model
from circuitsae.tasks.files import read_examples
from tests.sample_graphs import small_graph, whole_graph
from transcoders import save_dictionaries
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

FIRST, CASES, CHUNKS = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_CASES", "300")), 12
JUNK = [
    *(None, True, -1, 0, 3, 2.5, 1e308, 1e999, 10**9, 10**30, -(10**400), float("nan")),
    *("", "\ud800", "</script>", "7", "NaN", "x" * 5000, [], {}, [{}], {"a": [1]}, [[]], [None] * 50),
]
FORMS = ("neuronpedia", "eleuther", "graphml", "gexf")
KINDS: list[dict[str, Any]] = [
    {"kind": kind, "activation": a} for kind in ("plt", "clt") for a in ("relu", "jumprelu", "topk")
]


@dataclass
class Case:
    """A sound input in a folder of its own, the damage, and the command that meets it."""

    rng: random.Random
    sound: Path
    folder: Path

    def copy(self, name: str) -> Path:
        source, target = self.sound / name, self.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target

    def damage(self, file: Path) -> None:
        if file.suffix in (".json", ".yaml") and self.rng.random() < 0.6:
            return self._structure(file)
        if file.suffix == ".safetensors" and self.rng.random() < 0.7:
            return self._tensors(file)
        return self._bytes(file)

    def _bytes(self, file: Path) -> None:
        content, rng = bytearray(file.read_bytes()), self.rng
        at, length = rng.randrange(len(content)), rng.choice([1, 4, 64, 1000])
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content = content[:at]
            case 2:
                content[at : at + length] = rng.randbytes(length)
            case 3:
                content[at:at] = content[at : at + length]
            case 4:
                del content[at : at + length]
            case 5:
                content = bytearray(rng.choice([b"", b"[" * 100_000, b"{}", b"\x00" * 9, b"null", content * 2]))
        file.write_bytes(content)

    def _structure(self, file: Path) -> None:
        import yaml

        text, rng = file.read_text(encoding="utf-8"), self.rng
        document = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        at: Any = document
        key = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
        while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.85:
            at = at[key]
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(JUNK)
        if file.suffix == ".json":
            file.write_text(json.dumps(document), encoding="utf-8")
        else:
            file.write_text(yaml.safe_dump(document), encoding="utf-8")

    def _tensors(self, file: Path) -> None:
        tensors, rng = load_file(file), self.rng
        with safe_open(file, "pt") as opened:
            metadata = {k: v for k, v in (opened.metadata() or {}).items() if k != "checksums" or rng.random() < 0.3}
        name = rng.choice(list(tensors))
        old = tensors[name]
        changes: list[Callable[[], Any]] = [
            lambda: old.reshape(-1)[:-1],
            lambda: old.reshape(-1),
            lambda: old.unsqueeze(0),
            lambda: old.to(rng.choice([torch.int64, torch.bool, torch.uint8, torch.float64, torch.bfloat16])),
            lambda: torch.full_like(old, rng.choice([3, 1e30 if old.is_floating_point() else 9, -1])),
            lambda: old.clone().reshape(-1).index_fill(0, torch.tensor([0]), torch.nan).reshape(old.shape),
            lambda: old.clone().reshape(-1).index_fill(0, torch.tensor([0]), torch.inf).reshape(old.shape),
            lambda: old[..., :0] if old.ndim else old,
        ]
        if rng.random() < 0.1:
            del tensors[name]
        else:
            with contextlib.suppress(RuntimeError, ValueError, OverflowError):  # no NaN among whole numbers
                tensors[name] = rng.choice(changes)().contiguous()
        save_file(tensors, file, metadata=metadata)

    def any_file(self, folder: Path) -> Path:
        return self.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def _graph(case: Case) -> list[str]:
    graph = case.copy(case.rng.choice(["small", "whole"]))
    case.damage(case.any_file(graph))
    if case.rng.random() < 0.5:
        return ["show", str(graph), "--html", str(case.folder / "out" / "graph.html")]
    return ["export", str(graph), str(case.folder / "out" / "graph"), "--format", case.rng.choice(FORMS)]


def _exchange(case: Case) -> list[str]:
    file = case.copy(f"whole.{case.rng.choice(FORMS)}")
    renamed = file.rename(file.with_suffix(".json" if file.suffix in (".neuronpedia", ".eleuther") else file.suffix))
    case.damage(renamed)
    return ["import", str(renamed), "--out", str(case.folder / "out")]


def _dictionaries(case: Case) -> list[str]:
    folder = case.copy(case.rng.choice(sorted(p.name for p in case.sound.glob("*-dictionary"))))
    case.damage(case.any_file(folder))
    out = str(case.folder / "out")
    return ["trace", "a b", "--dictionaries", str(folder), "--out", out, "--validate", "3", "--model", "tiny"]


def _cards(case: Case) -> list[str]:
    folder = case.copy("cards")
    case.damage(case.any_file(folder))
    return ["features", "browse", str(folder), "--out", str(case.folder / "out")]


def _ledger(case: Case) -> list[str]:
    ledger = case.copy("ledger.json")
    case.damage(ledger)
    return ["features", "browse", str(case.sound / "cards"), "--labels", str(ledger), "--out", str(case.folder / "out")]


def _task(case: Case) -> list[str]:
    file = case.copy(case.rng.choice(["task.json", "task.csv"]))
    case.damage(file)
    return ["(read_examples)", str(file)]


def _prompt(case: Case) -> list[str]:
    rng = case.rng
    letters = [*" \n\t\x00aé漢🙂{\u202e", "\x1b[31m", "[bold]", "</script>", "%s", "\ud800"]
    prompt = "".join(rng.choice(letters) for _ in range(rng.choice([0, 1, 2, 5, 20, 3000])))
    out = str(case.folder / rng.choice(["out", "x" * 300, "file/below"]))
    (case.folder / "file").write_text("in the way")
    return ["trace", "--validate", "2", "--out", out, "--model", "tiny", "--dictionaries",
            str(case.sound / "clt-relu-dictionary"), "--", prompt]  # fmt: skip


MAKERS = [_graph, _exchange, _dictionaries, _dictionaries, _cards, _ledger, _task, _prompt]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound inputs of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    small_graph().save(folder / "small")
    graph = whole_graph(["<s>", " a", " b", " c", " d"])
    graph.save(folder / "whole")
    for form in FORMS:
        write_graph(graph, folder / f"whole.{form}", format=form)
    for options in KINDS:
        made = random_dictionaries(n_layers=2, d_model=16, features=12, k=3, **options)
        name = "-".join(options.values())
        save_dictionaries(made, folder / f"{name}-dictionary")
        if name != "clt-topk":
            save_dictionaries(made, folder / f"{name}-ct-dictionary", format="circuit-tracer")
    model = random_model("gpt2", n_layers=2, d_model=16, d_vocab=32)
    rows = torch.randint(1, 5, (12, 8), generator=torch.Generator().manual_seed(3))
    dictionaries = random_dictionaries("clt", n_layers=2, d_model=16, features=8)
    collect(model, dictionaries, rows, CollectConfig(tokens=60, context=8, top=2, logits=3), out=folder / "cards")
    Ledger([Label("months", ("0.1", "1.2"))]).save(folder / "ledger.json")
    task = [{"clean": "John ran to", "corrupt": "Paul ran to", "answers": [" Mary"], "roles": {"who": "John"}}] * 2
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "task.csv").write_text('clean,corrupted,answer\n"a, b","c, d", e\nf,g, h\n')
    return folder


@pytest.fixture(scope="module")
def tiny():
    """A random model with a tokenizer, loaded once."""
    model = random_model("gpt2", n_layers=2, d_model=16, d_vocab=8192, context=512)
    model.bridge.tokenizer = load_model("pocket").bridge.tokenizer
    return model


def outcome(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            read_examples(arguments[1]) if arguments[0] == "(read_examples)" else main(arguments)
        except InputError as error:
            return 2, out.getvalue(), f"error: {error}\n"
        except SystemExit as stopped:
            return int(stopped.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def complaint(code: int, printed: str, said: str, folder: Path) -> str | None:
    """What is wrong with an outcome; None for nothing."""
    left = [path.name for path in folder.rglob("*.tmp")]
    if left:
        return f"left {left}"
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        return None if len(lines) == 1 and len(said) < 1500 and said.rstrip().endswith((".", ")")) else f"says {said!r}"
    if code != 0:
        return f"exit {code}: {said!r}"
    if found := re.search(r"[+±=\s](nan|inf)\b", printed):
        return f"prints {found[0]!r}"
    for path in folder.glob("out/**/*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    if (folder / "out" / "graph.json").is_file():
        load_graph(folder / "out")
    for path in folder.glob("out/graph"):
        read_graph(path)
    return None


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in a JSON file")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_inputs_end_well_or_in_one_sentence(chunk, sound, tiny, tmp_path, monkeypatch):
    known = shared.load_language_model
    monkeypatch.setattr(
        shared, "load_language_model", lambda name, *rest: tiny if name == "tiny" else known(name, *rest)
    )
    failures = []
    for number in range(FIRST + chunk, FIRST + CASES, CHUNKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = Case(random.Random(number), sound, folder)
        arguments = MAKERS[number % len(MAKERS)](case)
        try:
            wrong = complaint(*outcome(arguments), folder)
        except Exception as error:
            wrong = f"raises {type(error).__name__}: {error}"
        if wrong:
            failures.append(f"case {number}, {' '.join(arguments)[:300]!r}: {wrong[:600]}")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
