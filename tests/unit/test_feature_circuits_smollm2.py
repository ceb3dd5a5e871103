"""`benchmarks/feature_circuits_smollm2.py`, with the embedded model in the place of SmolLM2."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import circuitsae as cs
from circuitsae.attribution import LogitTargets, attribute_pruned
from circuitsae.interventions import Feature, Intervention, Zero, intervene

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    module = importlib.import_module("feature_circuits_smollm2")
    sizes = {"SIZES": (0, 8, 128, 512), "HALF": 3, "GRAPHS": 2, "CONTROLS": 40, "DRAWN": 60, "ROWS": 2}
    for name, value in {**sizes, "RESULTS": tmp_path, "IMAGES": tmp_path}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def model() -> cs.ReplacementModel:
    return cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))


def test_a_task_goes_on_where_it_was_stopped(
    bench: Any, model: cs.ReplacementModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "text.txt").write_text("\n\n".join(["The keys to the cabinet are here ."] * 900))
    given = (model, "agreement", str(tmp_path / "text.txt"), tmp_path)

    def killed(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(bench, "effects", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.measured(*given)
    assert not bench.whole(tmp_path, "agreement")
    for done in ("nodes", "curves", "edges"):
        monkeypatch.setattr(bench, done, killed)
    found = bench.measured(*given)
    assert bench.whole(tmp_path, "agreement")

    ranked, random = (found["curves"]["lines"][way] for way in ("features and error nodes", "the first, at random"))
    assert ranked["f"][2][0] > 0.8 > 0.3 > random["f"][2][0]
    bench.draw("agreement", found)
    page = bench.write({"agreement": found})
    strongest = next(name for name in found["nodes"]["nodes"] if bench.feature_of(name)).partition("@")[0]
    assert f"| {strongest} |" in page
    assert strongest in bench.image("agreement").read_text()
    assert all(f"{edge['source']} → {edge['target']}" in page for edge in found["edges"]["edges"])


def test_what_a_prompt_says_of_an_edge_is_what_its_removal_does(bench: Any, model: cs.ReplacementModel):
    prompt = "The keys to the cabinet"
    tokens = model.tokens(prompt)
    answer = model.model.token_id(" are")
    graph = attribute_pruned(model, tokens, targets=LogitTargets([answer]))[0]
    column = abs(graph.weights[[graph.position[graph.top_logits()[0].id]]].toarray()[0])
    column[[str(node.kind) != "feature" or node.pos != len(tokens) - 1 for node in graph.nodes]] = 0
    node = graph.nodes[int(column.argmax())]
    name = f"{node.layer}.{node.index}@END"
    wanted = pd.DataFrame({"source": [name], "target": ["logit.answer@END"]})
    (said,) = bench.claims(model, graph, {"END": len(tokens) - 1}, wanted).items()

    removed = intervene(model, tokens, [Intervention(Feature(node.layer, node.index, node.pos), Zero())])
    change = float(removed.effect(lambda logits: logits[..., answer] - logits.mean(-1))[0, 0])
    assert said[0] == f"{name} → logit.answer@END"
    assert said[1]["model_measured"] == pytest.approx(change, rel=1e-3)
