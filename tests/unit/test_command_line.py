"""How the program is typed, what it prints where, and how it ends."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from rich.text import Text

import circuitsae.commands.app  # noqa: F401  the modules of the commands
from circuitsae import console, doctor
from circuitsae.cli import main
from circuitsae.commands import graphs
from circuitsae.commands.graph_folders import slug
from circuitsae.commands.shared import free_folder
from circuitsae.console import show_edges
from circuitsae.graph import load_graph
from circuitsae.graph.exchange import write_graph
from circuitsae.loading import load_dictionaries
from circuitsae.reproduce.result import Reproduction
from circuitsae.tables import Column, show_table
from circuitsae.validation import Validation, measuring
from tests.sample_graphs import small_graph

PROMPT = "When John and Mary went to the store, John gave a drink to"
QUICK = ("--max-features", "20", "--validate", "0")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs a command in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced") / "ioi"
    main(["trace", PROMPT, "--out", str(folder), "--validate", "12"])
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target", " Mary", "--target", " John", PROMPT],
        ["--target", " Mary", PROMPT, "--target", " John"],
        [PROMPT, "--target", " Mary", "--target", " John"],
    ],
)
def test_repeated_options_add_up_and_the_prompt_stands_anywhere(call, arguments):
    call("trace", *arguments, "--max-features", "5", "--validate", "0", "--out", "graph")
    graph = load_graph("graph")
    assert {node.text for node in graph.top_logits()} == {" Mary", " John"}
    assert "".join(graph.tokens[1:]) == PROMPT


@pytest.fixture
def copied(traced, tmp_path):
    """A graph to validate anew."""
    return shutil.copytree(traced, tmp_path / "copied")


def test_claims_are_all_or_those_named(call, copied):
    printed = call("validate", copied, "--edges", "2", "--controls", "19", "--claims", "graph", "--claims", "model",
                   "--wide")  # fmt: skip
    header = next(line for line in printed.splitlines() if "source → target" in line)
    assert re.search(r"┃ predicted ┃ measured ┃ ratio ┃\s+95 % ┃ graph\s+┃\s+model ┃", header)
    assert "direct edge" not in printed
    assert Validation.load(copied / "validation.json").claims == ("graph", "model")


def test_a_validation_that_was_ended_says_so_and_goes_on(copied, monkeypatch, capsys):
    words = ["validate", str(copied), "--edges", "2", "--controls", "5", "--claims", "graph", "--heads", "0"]
    made, real = [], measuring.run_reads

    def run_reads(*given, **how):
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **how)

    monkeypatch.setattr(measuring, "run_reads", run_reads)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 143
    assert "what was measured is kept, and the same command goes on" in capsys.readouterr().err
    assert len(list((copied / "measured").iterdir())) == 1
    main(words)
    assert not (copied / "measured").exists()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["3"], lambda frame: len(frame) == 3),
        (["30%"], lambda frame: 0.3 <= frame["influence"].sum() < 0.31 + frame["influence"].max()),
        (["token→logit"], lambda frame: set(frame["kind"]) == {"token→logit"}),
        (["tok@4 -> logit.529@14", "1"], lambda frame: "tok@4" in set(frame["source"]) and len(frame) <= 2),
    ],
)
def test_edges_are_chosen_by_count_share_class_and_id(call, copied, chosen, expected):
    options = [part for text in chosen for part in ("--edges", text)]
    call("validate", copied, *options, "--controls", "0", "--claims", "direct")
    assert expected(Validation.load(copied / "validation.json").edges)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--edges", "most"], "--edges"),
        (["--edges", "150%"], "share of the influence"),
        (["--edges", "feature→lodgit"], "'feature→lodgit'"),
        (["--controls", "-1"], "controls=-1"),
        (["--delta", "2"], "delta=2"),
        (["--claims", "frozen"], "frozen"),
        (["--regimes", "model"], "--regimes"),
        (["--prompts", "a.txt", "--task", "ioi"], "--prompts or --task, not both"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_tested_is_refused_and_nothing_is_written(copied, options, says, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(copied), *options])
    assert stopped.value.code == 2
    assert says.removeprefix("--edges") in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_validate_hands_on_what_it_was_told(copied, monkeypatch):
    told = {}
    monkeypatch.setattr(graphs, "_validate", lambda *_, **settings: told.update(settings) or sys.exit("seen"))
    with pytest.raises(SystemExit, match="seen"):
        main(["validate", str(copied), "--edges", "7", "--delta", "0.1", "--controls", "30", "--seed", "5",
              "--elsewhere", "A text", "--elsewhere", "another"])  # fmt: skip
    assert told == {
        "edges": 7, "claims": ("graph", "direct", "model"), "controls": 30, "delta": 0.1, "seed": 5,
        "elsewhere": ("A text", "another"), "heads": 10, "keep": copied / "measured",
    }  # fmt: skip


def test_edges_are_tested_on_other_prompts_and_verdicts_calibrated(call, copied, tmp_path):
    others = tmp_path / "others.txt"
    others.write_text("When Tom and Mary went to the store, Tom gave a drink to\n")
    words = ["validate", copied, "--edges", "8", "--controls", "20", "--prompts", others, "--calibrate", 2]
    printed = call(*words, columns=200)
    assert "on other prompts" in printed
    assert re.search(r"graph claim\s+│ planted", printed)
    assert "stability" in Validation.load(copied / "validation.json").edges


def test_edges_are_tested_on_a_tasks_other_prompts(call, copied):
    call("validate", copied, "--edges", "5", "--controls", "20", "--claims", "graph", "--task", "ioi")
    assert Validation.load(copied / "validation.json").edges["prompts"].tolist() != [1] * 5


def test_a_graph_validated_before_the_claims_is_shown_and_says_so(call, copied):
    document = json.loads((copied / "graph.json").read_text("utf-8"))
    columns = ["source", "target", "predicted", "frozen", "measured", "control", "verdict"]
    row = ["tok@4", "logit.529@14", -12.946, -12.946, -17.428, 9.084, "confirmed"]
    document["edge_notes"] = {"columns": columns, "data": [row]}
    (copied / "graph.json").write_text(json.dumps(document), "utf-8")
    printed = call("show", copied, columns=100)
    assert re.search(r"tok@4 +│ logit.529@14 +│ .*-12.946 │ +-17.428 │ confirmed", printed)
    assert "An older validation gave 1 edge one verdict of another question" in printed
    assert "run `circuitsae validate` again." in printed
    call("validate", copied, "--edges", "2", "--controls", "0", "--claims", "graph")
    assert "older" not in call("show", copied)


def test_white_space_is_traced(call):
    assert "Graph: graphs/prompt" in call("trace", "\n", *QUICK)


def test_a_prompt_in_no_utf8_is_one_sentence(tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["trace", os.fsdecode(b"caf\xe9")])
    assert stopped.value.code == 2
    said = capfdbinary.readouterr().err
    assert said.decode().count("\n") == 1
    assert b"not UTF-8" in said
    assert not list(tmp_path.iterdir())


def test_the_same_prompt_again_is_written_beside(call):
    folder = Path("graphs") / slug(PROMPT)
    first = call("trace", PROMPT, *QUICK)
    assert f"Graph: {folder}\n" in first
    before = (folder / "graph.json").read_bytes()
    again = call("trace", PROMPT, "--target", " John", *QUICK)
    assert f"Graph: {folder}-2\n" in again
    assert (folder / "graph.json").read_bytes() == before
    assert load_graph(f"{folder}-2").top_logits()[0].text == " John"
    call("trace", PROMPT, "--target", " John", "--overwrite", *QUICK)
    assert load_graph(folder).top_logits()[0].text == " John"


def test_the_first_free_folder_is_taken_and_held(tmp_path):
    def taken(name, overwrite=False):
        with free_folder(tmp_path / name, overwrite) as folder:
            return folder.name

    for name in ("a", "a-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert [taken("a"), taken("a", overwrite=True), taken("b"), taken("empty")] == ["a-3", "a", "b", "empty"]
    with free_folder(tmp_path / "b", False) as first, free_folder(tmp_path / "b", False) as second:
        assert [first.name, second.name] == ["b", "b-2"]
        (second / "graph.json").write_text("{}")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, second, second / "graph.json"])


def test_two_processes_do_not_choose_the_same_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from circuitsae.commands.shared import free_folder\n"
        "with free_folder(Path('here'), False) as folder:\n"
        "    print(folder, flush=True); sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    holding = {process.stdout.readline().strip(): process for process in processes if process.stdout is not None}
    assert set(holding) == {"here", "here-2", "here-3"}
    holding["here"].kill()  # gives back what it held
    for process in processes:
        process.communicate(timeout=20)
    with free_folder(tmp_path / "here", False) as folder:
        assert folder.name == "here"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_trace(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("circuitsae.commands.graphs.load_replacement", lambda *_: pytest.fail("the model was loaded"))
    Path("file").write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        main(["trace", PROMPT, "--out", out])
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: Cannot write [^\n]*\.\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_trace_that_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["trace", PROMPT, "--target", "not one token", "--out", "a/b"])
    assert not list(tmp_path.iterdir())


def test_the_precision_of_products_is_asked_for_where_the_device_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["trace", PROMPT, "--precision", "tf32", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "precision='tf32' needs the closed form on a CUDA device; the model is on cpu" in capsys.readouterr().err


def test_overwriting_leaves_nothing_of_the_earlier_graph(call, copied):
    assert (copied / "validation.json").exists()
    call("trace", PROMPT, "--max-features", "5", "--validate", "0", "--overwrite", "--out", copied)
    assert sorted(path.name for path in copied.iterdir()) == ["edges.npz", "graph.html", "graph.json"]


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_folders_that_pages_name_are_those_that_trace_writes(page):
    text = (ROOT / page).read_text("utf-8")
    written = {f"graphs/{slug(prompt)}" for prompt in re.findall(r'circuitsae trace "([^"]+)"', text)}
    written |= set(re.findall(r"circuitsae trace .* --out (\S+)", text))
    named = set(re.findall(r"circuitsae (?:validate|show|export) (graphs/\S+)", text))
    assert named
    assert named <= written


def test_steering_takes_one_line(call):
    printed = call("steer", "The capital of the state containing Dallas is", "--feature", "0.153@8", "--controls", "1",
                   "--generate", "2", "--texts", "0")  # fmt: skip
    assert "0.153@8 on logit(·Austin), wanted up" in printed
    assert len(re.findall(r"^│ +-?[\d.]+ │", printed, re.MULTILINE)) == 8
    assert "side effects not measured" in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith(("Recommended strength", "No strength is recommended"))


@dataclass
class Ran:
    """What a command printed, and the tables in it."""

    printed: str
    tables: list[tuple[str, list[Column], list[Any]]]


@pytest.fixture(scope="module")
def ran(traced, tmp_path_factory):
    """Every command that prints tables, once and quickly; what takes long and prints nothing is left out."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "text.txt").write_text("\n\n".join([PROMPT] * 40))
    write_graph(small_graph(), folder / "small.json")
    claims = Reproduction("ioi", "pocket", {}, seconds={"behaviour": 3.0})
    claims.add("faithfulness of the circuit with many words", 0.95, at_least=0.9, published=0.87, source="a paper")
    claims.add("completeness", -0.25, note="a note that says at length what was measured and how")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr("circuitsae.reproduce.reproduce", lambda *_, **__: claims)
        patch.setattr("transcoders.train", lambda *_, **__: load_dictionaries("pocket"))
        patch.setattr("circuitsae.report.browser.write_browser", lambda _, out: out / "index.html")
        for name, arguments in COMMANDS.items():
            tables = []

            def record(console, title, columns, rows, tables=tables):
                tables.append((title, list(columns), list(rows)))
                show_table(console, title, columns, rows)

            for module in USERS:
                patch.setattr(module, "show_table", record)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                main([part.format(folder=folder, graph=traced, prompt=PROMPT) for part in arguments])
            found[name] = Ran(out.getvalue(), tables)
    return found


USERS = (console, doctor, *(module for name, module in sys.modules.items() if re.match(r"circuitsae\.commands\.", name)
         and hasattr(module, "show_table")))  # fmt: skip
LAYER = r"[\d.]+ features are active per layer and token and leave .* of the variance unexplained; with all layers"
COMMANDS = {
    "trace": ["trace", "{prompt}", "--out", "{folder}/graph", "--validate", "4", "--max-features", "20"],
    "show": ["show", "{graph}", "--html", "{folder}/page.html"],
    "validate": ["validate", "{folder}/graph", "--edges", "6", "--controls", "3"],
    "compare": [
        *("compare", "{graph}", "{graph}", "--out", "{folder}/pair.html"),
        *("--names", "the first of them", "the other one"),
    ],
    "intervene": ["intervene", "{prompt}", "--feature", "2.mlp", "--zero"],
    "steer": [
        *("steer", "{prompt}", "--feature", "0.153", "--controls", "1", "--generate", "1", "--texts", "1"),
        *("--held-out", "When Ann and Tom went to the store, Ann gave a drink to", "--strengths", "-1"),
    ],
    "train": [
        *("train", "pocket", "--corpus", "{folder}/text.txt", "--out", "{folder}/trained", "--context", "16"),
        *("--features", "16", "--tokens", "256", "--batch", "128", "--evaluate-tokens", "30"),
    ],
    "evaluate": ["evaluate", "pocket", "pocket", "--tokens", "200", "--out", "{folder}/evaluation.json"],
    "collect": ["features", "collect", "--tokens", "200", "--corpus", "{folder}/text.txt", "--out", "{folder}/cards"],
    "browse": ["features", "browse", "{folder}/cards", "--out", "{folder}/browser"],
    "reproduce": ["reproduce", "ioi", "--out", "{folder}/report"],
    "lens": ["lens", "{prompt}", "--node", "0.err@-1", "--top", "2"],
    "patch": ["patch", "ioi", "--prompts", "2", "--role", "S2", "--out", "{folder}/patch.html"],
    "causal-trace": ["causal-trace", "The key", "--subject", "key", "--samples", "2", "--state", "attn_out"],
    "import": ["import", "{folder}/small.json", "--out", "{folder}/imported"],
    "doctor": ["doctor"],
}
TESTED = (
    r"Of the logit of ·Mary, .* \d+ of \d+ graph claims hold within a factor of two \(.*\); \d+ of \d+ direct edges "
    r"are confirmed.*; in the live model \d+ of \d+ point the right way\. "
    r"The tested edges hold \d+ % of the influence\."
)
LAST = {
    "trace": TESTED,
    "show": TESTED,
    "validate": TESTED,
    "compare": r"\d+ of \d+ edges are in both graphs; from the first of them to the other one .* changes most",
    "intervene": r"The change lowers logit\(·Mary\) by [\d.]+ .*; the first choice",
    "steer": r"(Recommended strength: -?\d+|No strength is recommended): ",
    "train": LAYER,
    "evaluate": LAYER,
    "collect": r"\d+ of [\d,]+ features fired; 0 have a label\.",
    "browse": r"\d+ of [\d,]+ features fired; 0 have a label\.",
    "lens": r"0\.err@-1 speaks most for ",
    "patch": r"Mean logit_diff: .* Before the last column layer \d at S2 does most: .* of \+\d",
    "causal-trace": r"Mean P\(.*\): .* Before the last column layer \d at .* does most: ",
    "reproduce": r"1 of 1 claim with a bar meet it\.",
    "import": r"Of the logit of ·b, ",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_table_is_broken(ran, name):
    """Each cell is, whole, one that the wide form has; a column left out is named; a terminal's width is kept."""
    assert ran[name].tables
    shown = [(table, width) for table in ran[name].tables for width in (40, 60, 72, 80, 100, 140)]
    for (title, columns, rows), width in shown:
        wide, narrow = (_rendered(title, columns, rows, w) for w in (10_000, width))
        assert "No room for" not in wide
        gone = re.findall(r"No room for: (.*); --wide", narrow)
        if any(column.wraps for column in columns):  # between words; the last resort is to cut text
            assert {word for word in _words(narrow) if "…" not in word} <= _words(wide)
        elif "…" in narrow:
            assert {cell for cell in _cells(narrow) if "…" not in cell} <= _cells(wide)
        else:
            assert _cells(narrow) <= _cells(wide)
            assert (_cells(narrow) == _cells(wide)) == (not gone)
        if width >= 60:
            assert max(len(line) for line in narrow.splitlines() if line[:1] in tuple("┃│┏┡├└")) <= width


@pytest.mark.parametrize("name", LAST)
def test_every_command_ends_with_what_was_found(ran, name):
    printed = ran[name].printed
    said = re.search(LAST[name], printed)
    assert said is not None, printed
    assert said.start() > printed.rindex("└")
    after = printed[said.end() :].splitlines()[1:]
    assert all(re.match(r"(HTML|Graph|Written|Next|Dictionaries|Cards|Pages): ", line) for line in after if line), after


def test_an_export_says_how_much_it_wrote(call, traced):
    assert re.match(r"The graph has [\d,]+ nodes and [\d,]+ edges\.\nWritten: ", call("export", traced, "graph.json"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_prints_tables_takes_wide(name, capsys):
    words = [word for word in COMMANDS[name][:2] if word in (name, "features")]
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert "--wide" in capsys.readouterr().out


def _rendered(title, columns, rows, width):
    printed = io.StringIO()
    show_table(Console(width=width, file=printed), title, columns, rows)
    return printed.getvalue()


def _words(text):
    return {word for cell in _cells(text) for word in cell.split()}


def _cells(text):
    rows = [re.split("[┃│]", line)[1:-1] for line in text.splitlines() if line[:1] in "┃│"]
    return {cell.strip() for row in rows for cell in row if cell.strip()}


def test_a_table_leaves_out_whole_columns_then_cuts_text():
    columns = [Column("name", text=True), Column("first to go", 1), Column("value"), Column("note", 2, wraps=True)]
    first = ["[bold]a name of some length[/bold]", "1.0000", Text("-12.345"), "words that may wrap, averylongword"]

    def shown(width):
        printed = io.StringIO()
        console = Console(width=width, file=printed)
        show_table(console, "A title that is longer than the table", columns, [first, None, ["b", "2", "3", ""]])
        return printed.getvalue()

    assert "first to go" in shown(120).splitlines()[2]
    assert "No room for: first to go;" in shown(70)
    assert "averylongword" in shown(70)
    assert "[bold]a name of some length[/bold]" in shown(70)
    assert "No room for: first to go, note;" in shown(50)
    assert "…" in shown(30)
    assert "-12.345" in shown(10)


def test_the_wide_table_of_edges_says_all_that_was_found():
    found = {
        "graph_predicted": [1.0, -2.0], "graph_measured": [np.inf, -1e8], "graph_ratio": [np.nan, 0.5],
        "graph_low": [np.nan, 0.25], "graph_high": [np.nan, 0.75], "graph_q": [np.nan, 0.0421],
        "graph_verdict": ["undecided", None], "graph_reason": ["a measurement is not a finite number", ""],
        "direct_verdict": ["attention", "norms"], "direct_head": ["2.3", None], "miss": ["curvature", None],
        "influence": [0.1234, 0.0], "of_mine": ["x", "y"],
    }  # fmt: skip
    printed = io.StringIO()
    show_edges(Console(width=400, file=printed), "", [(Column("edge"), ["a", "b"])], pd.DataFrame(found))
    rows = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in printed.getvalue().splitlines()]
    header, one, other = filter(None, rows)
    assert dict(zip(header, one, strict=True)) == {
        "edge": "a", "predicted": "+1.000", "measured": "+inf", "ratio": "", "95 %": "", "graph": "undecided",
        "direct": "attention", "graph q": "", "why undecided": "a measurement is not a finite number", "head": "2.3",
        "model misses by": "curvature", "influence": "12.3%",
    }  # fmt: skip
    assert other == ["b", "-2.000", "-1.0e+08", "0.50", "[0.25, 0.75]", "", "norms", "0.042", "", "", "", "0.0%"]


def test_what_is_said_of_a_logit_is_what_its_row_holds(traced):
    from circuitsae.sentences import of_logit

    graph = load_graph(traced)
    (row,) = [i for i, node in enumerate(graph.nodes) if node.text == " Mary" and node.kind == "logit"]
    weights = abs(graph.weights[[row]].toarray()[0])
    share = {kind: 100 * sum(w for w, node in zip(weights, graph.nodes, strict=True) if node.kind == kind)
             / graph.inputs[row] for kind in ("feature", "token", "error")}  # fmt: skip
    said = re.findall(r"(\d+) %", of_logit(graph))
    assert [int(number) for number in said[:3]] == [round(share[kind]) for kind in ("feature", "token", "error")]
    assert sum(map(int, said[:4])) == pytest.approx(100, abs=2)  # then what passed by skip terms


def test_a_closed_pipe_is_quiet_and_the_graph_is_written(tmp_path):
    command = f"{sys.executable} -m circuitsae.cli trace {PROMPT!r} --out graph --max-features 20 --validate 4 | head"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("\n") == 10
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert load_graph(tmp_path / "graph").top_logits()[0].text == " Mary"


def test_help_into_a_closed_pipe_is_quiet(tmp_path):
    command = f"{sys.executable} -m circuitsae.cli trace --help | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["tyro", "torch"])
def test_an_interrupted_import_is_quiet(tmp_path, module):
    """Ctrl-C while the program, or torch, is imported: a module of that name stands in the way and waits."""
    (tmp_path / f"{module}.py").write_text("import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)\n")
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` turns it off
    code = f"{heard}; import sys; sys.path.insert(0, {str(tmp_path)!r}); from circuitsae.cli import main; main()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, "trace", PROMPT], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (tmp_path / "here").exists():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, printed = running.communicate(timeout=60)
    assert (running.returncode, printed) == (130, "interrupted\n")
