"""`circuitsae audit`: circuits as files, what is found where none is given, the plan, and what is written."""

import json
from dataclasses import replace

import pytest

from circuitsae import ReplacementModel, attribute, load_dictionaries, random_model
from circuitsae.audit import Audit, HeadSubject, Settings, TaskSource, circuit_file, discovery
from circuitsae.audit import audit as run_audit
from circuitsae.audit.circuit_file import CircuitFile, read_circuit, roles_of
from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.discovery import find_circuit_file, find_sizes, subject_of
from circuitsae.audit.plan import plan
from circuitsae.cli import main
from circuitsae.components import Edge, edges_of_nodes, known_circuit
from circuitsae.components.network import Network
from circuitsae.graph.exchange import write_graph
from circuitsae.interventions import Feature
from circuitsae.reproduce import Reproduction
from circuitsae.reproduce.circuit import select_circuit
from circuitsae.validation.circuits import Circuit
from tests.sample_audits import sample_audit
from transcoders.errors import FileFormatError, InputError

PROMPT = "When John and Mary went to the store, John gave a drink to"
NODES = ("0.1@IO", "1.2@END", "1.err@END", "3.err@END")


@pytest.fixture(scope="module")
def replacement(pocket):
    return ReplacementModel(pocket, load_dictionaries("pocket"))


@pytest.fixture(scope="module")
def best(replacement, tmp_path_factory):
    """A file of many good edges."""
    source = TaskSource("ioi", replacement.model)
    scores = HeadSubject(source, [("embed", "logits")]).scored(8)
    edges = tuple(edge for edge in scores.ranked()[:160] if isinstance(edge, Edge))
    return CircuitFile("heads", "ioi", "pocket", edges).save(tmp_path_factory.mktemp("circuits") / "best.json")


@pytest.fixture
def few(monkeypatch):
    """--quick with fewer prompts yet, here and in the task that a graph's prompt is looked for in."""
    monkeypatch.setattr(Settings, "quick", lambda seed=0, *, large=False: Settings(held_out=12, seed=seed))
    monkeypatch.setattr(circuit_file, "DRAWN", 400)


def refused(arguments, capsys, code=2):
    with pytest.raises(SystemExit) as done:
        main(["audit", *map(str, arguments)])
    assert done.value.code == code
    return " ".join(capsys.readouterr().err.split())


def test_a_circuit_is_read_as_it_was_written(pocket, tmp_path):
    heads = CircuitFile("heads", "ioi", "pocket", (Edge("a0.h1", "m1"), Edge("m1", "logits")), found={"prompts": 8})
    nodes = CircuitFile("features", "ioi", "pocket", (Feature(0, 1, "IO"), Feature(1, 2, -1)), "pocket")
    for number, file in enumerate((heads, nodes)):
        assert read_circuit(file.save(tmp_path / f"{number}.json"), pocket) == file
    published = {"task": "agreement", "model": "pocket", "nodes": [{"id": "0.1@IO"}], "edges": [], "curves": {}}
    (tmp_path / "circuit.json").write_text(json.dumps(published))
    read = read_circuit(tmp_path / "circuit.json", pocket)
    assert (read.kind, read.task, read.circuit.ids) == ("features", "agreement", ("0.1@IO",))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "no circuit: it holds no graph"), ("{}", "no circuit: it holds"),
     ('{"kind": "heads"}', "neither"), ('{"kind": "heads", "edges": []}', "empty"),
     ('{"kind": "heads", "edges": [["a0.h1"]]}', "is no edge"), ('{"kind": "features", "nodes": [3]}', "is no node"),
     ('{"kind": "features", "nodes": ["x@IO"]}', "x@IO"), ('{"kind": "tea", "nodes": ["0.1@IO"]}', "neither"),
     ('{"kind": "heads", "edges": [["a0.h1", "m1"]], "task": 3}', "no text"), ("[1, 2]", "is no circuit"),
     ('{"kind": "heads", "edges": [["a9.h1", "m1"]]}', "no edge a9.h1"),
     ('{"kind": "heads", "edges": [["a0.h1", "m1"]], "model": "gpt2"}', "a circuit of gpt2")],
)  # fmt: skip
def test_everything_else_is_refused(text, said, pocket, tmp_path):
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        read_circuit(tmp_path / "circuit.json", pocket)
    assert str(raised.value).endswith(".")


def test_positions_of_a_graph_become_roles_of_the_task(replacement, tmp_path, few):
    model = replacement.model
    tokens = model.token_strings(model.to_tokens(PROMPT))
    roles = roles_of(tokens, model, "ioi")
    assert roles is not None
    words = {role: tokens[at].strip() for role, at in roles.items()}
    assert (words["IO"], words["S1"], words["S2"], words["END"]) == ("Mary", "John", "John", "to")
    others = model.token_strings(model.to_tokens(PROMPT.replace("John gave", "Paul gave")))
    assert roles_of(others, model, "ioi") is None, "three people"
    graph = attribute(replacement, PROMPT).prune(nodes=0.8)
    for path in (graph.save(tmp_path / "graph"), write_graph(graph, tmp_path / "graph.graphml")):
        found = read_circuit(path, model, "ioi")
        at = {node.at for node in found.circuit.nodes}
        assert {"END"} < at
        assert not at & set(roles.values())
        assert len(found.units) == sum(node.kind in ("feature", "error") for node in graph.nodes)
    with pytest.raises(InputError, match="give --task"):
        read_circuit(tmp_path / "graph", model)
    with pytest.raises(InputError, match="none of 400 prompts of greater-than"):
        read_circuit(tmp_path / "graph", model, "greater-than")


def test_a_published_circuit_goes_by_its_name_and_is_of_gpt2(pocket):
    small = random_model("gpt2", n_layers=12, n_heads=12, d_model=24)
    small.name = "gpt2"
    graph = Network.of(small).graph
    known = known_circuit("ioi-acdc")
    assert frozenset(read_circuit("ioi-acdc", small).edges) == known.edges(graph)
    wang = read_circuit("ioi-wang2022", small)
    mlps = [f"m{layer}" for layer in range(12)]
    assert frozenset(wang.edges) == edges_of_nodes(graph, [*known_circuit("ioi-wang2022").nodes, *mlps])
    assert wang.task == "ioi"
    with pytest.raises(InputError, match="the model is pocket"):
        read_circuit("ioi-acdc", pocket)
    with pytest.raises(InputError, match="There is no circuit 'ioi'"):
        read_circuit("ioi", pocket)


def test_a_circuit_is_found_as_it_is_reproduced_and_kept(pocket, tmp_path, monkeypatch):
    sizes = replace(find_sizes(pocket, quick=True).capped(4), rescore=2)
    made = find_circuit_file(pocket, "induction", sizes, keep=tmp_path)
    assert frozenset(made.edges) == select_circuit(pocket, "induction", sizes).circuit
    assert (made.found["prompts"], made.found["candidates"]) == (4, len(Network.of(pocket).graph.edges))
    monkeypatch.setattr(discovery, "select_circuit", None)
    assert find_circuit_file(pocket, "induction", sizes, keep=tmp_path) == made


def test_the_command_writes_what_the_library_finds(best, replacement, tmp_path, capsys, few):
    main(["audit", str(best), "--quick", "--only", "sufficiency", "--seed", "3", "--out", str(tmp_path)])
    found = Audit.load(tmp_path / "audit.json")
    subject = subject_of(read_circuit(best, replacement.model), replacement.model, "ioi", seed=3)
    own = run_audit(subject, settings=Settings.quick(3), only=["sufficiency"])
    assert found.findings[0].estimate == own.findings[0].estimate
    assert found.findings[0].status != "disconfirmed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.html", "audit.json"]
    assert own.findings[0].said.split(",")[0] in (tmp_path / "audit.html").read_text("utf-8")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.index("Nothing that was tested is disconfirmed.") < printed.index("sufficiency")


def test_a_criterion_that_fails_is_named_with_exit_code_1(best, tmp_path, capsys, few):
    bad = CircuitFile("heads", "ioi", "pocket", (Edge("embed", "logits"),)).save(tmp_path / "bad.json")
    arguments = [bad, "--quick", "--only", "sufficiency", "--out", tmp_path / "bad"]
    said = refused(arguments, capsys, code=1)
    assert "1 of 1 criteria are disconfirmed: sufficiency" in said
    assert Audit.load(tmp_path / "bad" / "audit.json").findings[0].status == "disconfirmed"
    main(["audit", "--compare", str(best), str(bad), "--quick", "--only", "sufficiency", "--out", str(tmp_path / "c")])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["a", "b", "comparison.html"]
    assert "sufficiency" in (tmp_path / "c" / "comparison.html").read_text("utf-8")
    assert "disconfirmed" in capsys.readouterr().out


def test_features_are_audited_with_the_dictionaries_that_the_file_names(tmp_path, replacement):
    file = CircuitFile("features", "ioi", "pocket", Circuit.of(NODES).nodes, "pocket")
    subject = subject_of(file, replacement, "ioi")
    assert set(subject.parts) == {"0.1", "1.2", "1.err", "3.err"}
    with pytest.raises(InputError, match="give --dictionaries"):
        subject_of(file, replacement.model, "ioi")


def test_a_plan_counts_runs_and_writes_nothing(best, replacement, tmp_path, capsys):
    subject = subject_of(read_circuit(best, replacement.model), replacement.model, "ioi")
    settings = Settings.quick()
    planned = plan(subject, settings=settings)
    runs = {criterion.key: criterion.runs(subject, settings) for criterion in CRITERIA}
    assert {one.criterion: one.runs for one in planned.criteria} == runs
    assert planned.seconds == pytest.approx(planned.runs * planned.per_run)
    assert planned.per_run > 0
    assert planned.memory > 2**27, "torch and the model"
    main(["audit", "--task", "ioi", "--plan", "--only", "sufficiency", "--quick", "--out", str(tmp_path / "none")])
    assert "stood in" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_reproduce_writes_its_circuits_as_an_audit_reads_them(replacement, tmp_path, monkeypatch):
    edges, nodes = frozenset({Edge("a0.h1", "m1"), Edge("m1", "logits")}), Circuit.of(NODES)
    report = Reproduction("ioi", "pocket", {}, edges=edges, nodes=nodes)
    monkeypatch.setattr("circuitsae.reproduce.reproduce", lambda *_, **__: report)
    main(["reproduce", "ioi", "--quick", "--seed", "2", "--out", str(tmp_path)])
    heads, features = (
        read_circuit(tmp_path / f"ioi-{name}.json", replacement.model) for name in ("circuit", "features")
    )
    assert (frozenset(heads.edges), heads.task, heads.found["seed"]) == (edges, "ioi", 2)
    assert (features.circuit, features.dictionaries) == (nodes, "pocket")


def test_two_audits_need_no_model(tmp_path, capsys, monkeypatch):
    for name, shift in (("one", 0.0), ("two", 0.4)):
        (tmp_path / name).mkdir()
        sample_audit(shift=shift).save(tmp_path / name / "audit.json")
    monkeypatch.setattr("circuitsae.loading.load_model", None)
    main(["audit", "--compare", str(tmp_path / "one"), str(tmp_path / "two" / "audit.json"), "--out", str(tmp_path)])
    assert "They differ in" in capsys.readouterr().out
    assert "necessity" in (tmp_path / "comparison.html").read_text("utf-8")
    other = sample_audit(task="induction").save(tmp_path / "other.json")
    assert "give two of one task" in refused(["--compare", tmp_path / "one", other], capsys)
    assert "only one is an audit" in refused(["--compare", other, tmp_path / "nothing"], capsys)


def test_what_cannot_be_asked_is_refused(best, tmp_path, capsys):
    assert "Nothing is named to audit" in refused([], capsys)
    assert "names both" in refused([best, "--compare", "a", "b"], capsys)
    assert "is a file" in refused([best, "--out", best], capsys)
    assert "no criterion 'suficiency'" in refused([best, "--only", "suficiency", "--out", tmp_path], capsys)
    with pytest.raises(FileFormatError, match="is no audit"):
        Audit.load(best)
