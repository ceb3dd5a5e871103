"""Many prompts by one command: what single calls write, to the bit; what fails, what is killed, who shares them."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitsae.attribution import Asked, LogitTargets, TopLogits, attribute_many, attribute_pruned
from circuitsae.cli import main
from circuitsae.commands import many
from circuitsae.commands.graphs import trace as trace_command
from circuitsae.graph import load_graph
from circuitsae.loading import load_dictionaries
from circuitsae.replacement import ReplacementModel
from circuitsae.report import write_index
from tests.killed import ended, forked, killed_before_touching
from tests.ranks import on_ranks
from tests.unit.test_index import rows_of
from transcoders.errors import CheckFailedError, FileFormatError, InputError, PromptError, Stopped
from transcoders.files import settle
from transcoders.training.distributed import World
from transcoders.training.stopping import StopRequest

CAPITAL, GIFT = "The capital of the state containing Dallas is", "John and Mary went home. John gave a book to"
FEW = ("--max-features", "4")


@pytest.fixture(scope="module")
def replacement(pocket) -> ReplacementModel:
    return ReplacementModel(pocket, load_dictionaries("pocket"))


@pytest.fixture
def here(tmp_path, monkeypatch, replacement) -> Path:
    """An empty folder to run commands in, which find the model loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("circuitsae.commands.graphs.load_replacement", lambda *_, **__: replacement)
    return tmp_path


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Of all graphs below a folder, file by file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*")) if path.is_file()}


def graph_files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("graph.json", "edges.npz")]


def asked_of(file: Path, out: Path) -> tuple[list[str], Path]:
    return ["trace", "--prompts", str(file), "--out", str(out), *FEW], out


def test_attribute_many_is_attribute_pruned_of_each_and_goes_on_after_an_error(replacement):
    prompts = [CAPITAL, "", Asked(GIFT, (" Mary", " nosuchtoken")), Asked(GIFT, (" Mary",), id="gift")]
    found = list(attribute_many(replacement, prompts, max_features=6, nodes=0.9))
    assert [one.asked.id for one in found] == [None, None, None, "gift"]
    assert [one.error is None for one in found] == [True, False, False, True]
    assert all(isinstance(one.error, PromptError) for one in found[1:3])
    for one, targets in ((found[0], TopLogits()), (found[3], LogitTargets((" Mary",)))):
        graph, full = attribute_pruned(replacement, one.asked.prompt, max_features=6, nodes=0.9, targets=targets)
        assert one.graph is not None
        assert one.full == full
        assert one.graph.weights.data.tobytes() == graph.weights.data.tobytes()
        assert one.graph.influence.tobytes() == graph.influence.tobytes()
        assert one.graph.nodes_frame().equals(graph.nodes_frame())
        assert one.graph.provenance == graph.provenance


def test_settings_are_refused_before_any_prompt_is_read(replacement):
    def unread() -> Iterator[str]:
        raise AssertionError("a prompt was read")
        yield

    refused: list[dict[str, Any]] = [{"nodes": 0.0}, {"max_features": 0}, {"engine": "other"}, {"unexplained": 2.0}]
    for wrong in refused:
        with pytest.raises(InputError):
            attribute_many(replacement, unread(), **wrong)
    with pytest.raises(TypeError):
        attribute_many(replacement, unread(), no_such_setting=1)


def test_memory_that_is_not_enough_is_an_error_of_its_prompt(replacement, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("of 99 GiB")

    monkeypatch.setattr("circuitsae.attribution.many.attribute_pruned", too_large)
    (found,) = attribute_many(replacement, [CAPITAL])
    assert "needs more memory than there is (of 99 GiB)" in str(found.error)


def test_a_folder_of_graphs_as_single_calls_write_them(here, capsys):
    rows = {"prompt": CAPITAL, "id": "dallas"}, {"prompt": GIFT, "target": " Mary", "more": 1}, {"prompt": GIFT}
    file = write_rows(here / "some prompts.jsonl", *rows)
    main(["trace", "--prompts", str(file), *FEW, "--target", " John"])
    out = here / "graphs" / "some-prompts"
    printed = " ".join(capsys.readouterr().out.split())
    assert "(3 of 3 prompts)" in printed
    found = listed(out)
    assert [row["id"] for row in found] == ["dallas", None, None]
    for number, (row, target) in enumerate(zip(found, (" John", " Mary", " John"), strict=True), 1):
        alone = here / "alone" / str(number)
        main(["trace", row["prompt"], *FEW, "--target", target, "--validate", "0", "--out", str(alone)])
        assert graph_files(out / row["folder"]) == graph_files(alone)
        graph = load_graph(out / row["folder"])
        assert row["number"] == number
        assert (row["nodes"], row["edges"], row["tokens"]) == (len(graph.nodes), graph.weights.nnz, len(graph.tokens))
        assert row["answer"] == target
        assert row["targets"] == [target]
        assert row["scores"] == graph.scores.as_dict()
        assert row["error"] is None
        assert "key" not in row
    linked = rows_of(out / "index.html")
    assert [row["name"] for row in linked] == [row["folder"] for row in found]
    assert not any("href" in row for row in linked)
    assert not list(out.rglob("graph.html"))
    main(["show", str(out / found[0]["folder"])])
    assert ["href" in row for row in rows_of(write_index(out, write_page=None))] == [True, False, False]


def test_a_bad_prompt_is_listed_and_tried_again_and_the_others_are_done_once(here, capsys, monkeypatch):
    file = write_rows(here / "two.jsonl", {"prompt": GIFT, "target": " nosuchtoken"}, {"prompt": CAPITAL})
    command, out = asked_of(file, here / "out")
    said = r"1 of 2 prompts have no graph \(0001-john.*' nosuchtoken' is .* tokens"
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 1
        assert "1 of 2 prompts have no graph" in " ".join(capsys.readouterr().err.split())
    bad, good = listed(out)
    assert "' nosuchtoken' is" in bad["error"]
    assert good["error"] is None
    assert len(rows_of(out / "index.html")) == 1
    seen = []
    monkeypatch.setattr(many, "_write", lambda *given: seen.append(given[1].number))
    with pytest.raises(CheckFailedError, match=said):
        trace_command(None, prompts=file, out=out, max_features=4)
    assert seen == [1]
    monkeypatch.undo()


def test_graphs_of_other_prompts_or_settings_are_not_taken_for_these(here, capsys):
    file = write_rows(here / "p.jsonl", {"prompt": GIFT}, {"prompt": ""})
    command, out = asked_of(file, here / "out")
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"):
            main(command)
    before = contents(out)
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--nodes", "0.5"])
    assert "holds the graph of another prompt, or of other settings" in " ".join(capsys.readouterr().err.split())
    assert contents(out) == before
    write_rows(file, {"prompt": CAPITAL})
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert contents(out) == before
    main([*command, "--overwrite"])
    assert {path.name[:4] for path in out.iterdir() if path.is_dir()} == {"0001"}
    (row,) = listed(out)
    assert row["prompt"] == CAPITAL
    write_rows(file, {"prompt": CAPITAL}, {"prompt": GIFT})  # a longer file is gone on with
    main(command)
    assert [row["prompt"] for row in listed(out)] == [CAPITAL, GIFT]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Prompt 1 of .* is no JSON"),
        ('{"prompt": "a"}\n\n["b"]', "Prompt 2 of .* has no prompt"),
        ('{"prompt": 3}', "has no prompt"),
        ('{"prompt": "a", "target": [true]}', r"has the target \[True\]"),
        ("", "has no prompt"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, text, said):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        many.read_asked(tmp_path / "p.jsonl")
    assert isinstance(error.value, FileFormatError) == bool(text)


def test_one_json_document_is_not_taken_for_lines_of_text(tmp_path):
    with pytest.raises(FileFormatError, match="is one JSON document; give JSON lines"):
        many.read_asked(tmp_path / "p.json")


def test_lines_of_text_are_prompts_and_a_separator_inside_a_prompt_ends_no_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeff one\r\n\r\ntwo\u2028three\n".encode())
    assert [one.prompt for one in many.read_asked(tmp_path / "p.txt")] == [" one", "two\u2028three"]
    file = write_rows(tmp_path / "p.jsonl", {"prompt": "a\u2028b", "targets": [" c", 4], "id": 7})
    (one,) = many.read_asked(file)
    assert (one.prompt, one.targets, one.id) == ("a\u2028b", (" c", 4), "7")


@pytest.mark.parametrize("arguments", [[], [CAPITAL, "--prompts", "p.txt"]])
def test_a_prompt_or_a_file_of_prompts(here, capsys, arguments):
    (here / "p.txt").write_text(CAPITAL)
    with pytest.raises(SystemExit, match="2"):
        main(["trace", *arguments])
    assert "one of the two" in capsys.readouterr().err


def test_validation_and_pages_where_they_are_asked_for(here):
    (here / "p.txt").write_text(CAPITAL)
    main(["trace", "--prompts", "p.txt", "--out", "out", *FEW, "--validate", "3", "--html"])
    (row,) = listed(here / "out")
    folder = here / "out" / row["folder"]
    assert len(json.loads((folder / "validation.json").read_text())["edges"]) == 3
    assert (folder / "graph.html").is_file()
    assert "href" in rows_of(here / "out" / "index.html")[0]
    notes = load_graph(folder).edge_notes
    assert notes is not None
    assert len(notes) == 3


def test_stopped_between_two_prompts_it_says_how_to_go_on(here, monkeypatch):
    file = write_rows(here / "p.jsonl", {"prompt": CAPITAL}, {"prompt": GIFT})
    command, out = asked_of(file, here / "out")
    main(command)
    whole = contents(out)
    stopped = StopRequest()
    stopped.number = signal.SIGTERM
    write = many._write
    with monkeypatch.context() as patched:
        patched.setattr("transcoders.training.stopping.StopRequest", lambda: stopped)
        patched.setattr(many, "_write", lambda *given: write(*given))
        with pytest.raises(Stopped, match="Stopped after 1 of 2 prompts; the same command goes on") as error:
            trace_command(None, prompts=file, out=here / "other", max_features=4)
    assert error.value.exit_code == 143
    assert len(list((here / "other").glob("*/graph.json"))) == 1
    main(["trace", "--prompts", str(file), "--out", "other", *FEW])
    assert contents(here / "other") == whole


def test_killed_before_any_touch_of_the_disk_it_goes_on_to_the_same_graphs(here):
    file = write_rows(here / "p.jsonl", {"prompt": CAPITAL}, {"prompt": GIFT})
    given: dict[str, Any] = {"prompts": file, "max_features": 1, "nodes": 0.5}
    trace_command(None, out=here / "unbroken", **given)
    whole, kills = contents(here / "unbroken"), 0
    for number in range(2, 200, 13):
        out = here / str(number)
        work = killed_before_touching(out, number, lambda out=out: trace_command(None, out=out, **given))
        if (status := ended(forked(work))) != -signal.SIGKILL:
            assert status == 0
            break
        kills += 1
        for done in out.glob("*/prompt.json"):
            settle(done.parent)
            assert graph_files(done.parent) == graph_files(here / "unbroken" / done.parent.name)
        trace_command(None, out=out, **given)
        assert contents(out) == whole
    assert kills > 3


class NextTo(World):
    """The first of two ranks: while it waits for the first time, the other one does its part."""

    other: Callable[[], None] | None = None

    def wait(self) -> None:
        if self.first and self.other is not None:
            other, self.__dict__["other"] = self.other, None
            other()


def test_two_ranks_share_what_is_missing_and_write_what_one_does(here, monkeypatch):
    rows = [{"prompt": CAPITAL}, {"prompt": GIFT}, {"prompt": f"{GIFT} the"}, {"prompt": "The"}]
    file = write_rows(here / "p.jsonl", *rows[:1])
    for out in ("one", "two"):
        main(asked_of(file, here / out)[0])
    file = write_rows(file, *rows)
    main(asked_of(file, here / "one")[0])
    ranks, given, write = [NextTo(0, 2), NextTo(1, 2)], {0: [], 1: []}, many._write

    def as_rank(rank: int) -> None:
        with monkeypatch.context() as patched:
            patched.setenv("RANK", str(rank))
            patched.setattr("transcoders.training.distributed.join", lambda _: ranks[rank])
            patched.setattr(many, "_write", lambda *of: given[rank].append(of[1].number) or write(*of))
            main(asked_of(file, here / "two")[0])

    ranks[0].__dict__["other"] = lambda: as_rank(1)
    as_rank(0)
    assert given == {0: [2, 4], 1: [3]}
    assert contents(here / "two") == contents(here / "one")
    assert listed(here / "two") == listed(here / "one")


def traced_by_a_rank(world: World, file: str, out: str) -> int:
    main(asked_of(Path(file), Path(out))[0])
    return len(contents(Path(out)))


@pytest.mark.slow
def test_two_processes_do(here):
    file = write_rows(here / "p.jsonl", {"prompt": CAPITAL}, {"prompt": GIFT}, {"prompt": f"{GIFT} the"})
    main(asked_of(file, here / "one")[0])
    assert max(on_ranks(traced_by_a_rank, str(file), str(here / "two"))) == len(contents(here / "one"))
    assert contents(here / "two") == contents(here / "one")
    assert listed(here / "two") == listed(here / "one")
