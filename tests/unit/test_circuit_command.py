"""`circuitsae circuit` on the pocket model: what it writes is what the library finds."""

import json

import pytest

from circuitsae.audit.circuit_file import read_circuit
from circuitsae.cli import main
from circuitsae.loading import load_dictionaries
from circuitsae.replacement import ReplacementModel
from circuitsae.tasks import load_task
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import faithfulness, rank_nodes


def test_a_circuit_of_the_pocket_model_on_agreement(pocket, tmp_path, capsys):
    main(["circuit", "agreement", "--prompts", "4", "--nodes", "24", "--edges", "4", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "circuit.json").read_text())
    model = ReplacementModel(pocket, load_dictionaries("pocket-sae"))
    task = load_task("agreement", pocket, 4)
    chosen, corrupt = prompt_task(pocket, task.take(slice(0, 2)))
    held, others = prompt_task(pocket, task.take(slice(2, None)))
    circuit = rank_nodes(model, chosen, corrupted=corrupt).circuit(24)
    curve = faithfulness(model, circuit, held, regime="model", by="position", others=others)
    assert [node["id"] for node in found["nodes"]] == list(circuit.ids)
    written = found["curves"]["features and error nodes"]["curve"]
    assert written[0]["f"] == pytest.approx(curve.f[0], abs=1e-5)
    assert {edge["source"] for edge in found["edges"]} <= set(circuit.first(4).ids)
    assert found["edges"]
    read = read_circuit(tmp_path / "circuit.json", pocket)
    assert (read.circuit.ids, read.dictionaries) == (circuit.ids, "pocket-sae")
    drawn = (tmp_path / "circuit.svg").read_text("utf-8")
    largest = max(found["edges"], key=lambda edge: abs(edge["effect"]))
    assert f"{largest['effect']:+.2g}".replace("-", "−") in drawn
    assert largest["source"].partition("@")[0] in drawn
    assert f"of {curve.full.mean():.3f} (all ablated: {curve.empty.mean():.3f})" in capsys.readouterr().out


def test_too_few_prompts_are_refused(capsys):
    with pytest.raises(SystemExit) as done:
        main(["circuit", "agreement", "--prompts", "1"])
    assert done.value.code == 2
    assert "at least 2" in capsys.readouterr().err
