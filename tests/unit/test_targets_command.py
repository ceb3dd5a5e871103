"""`circuitsae trace` with everything that a graph can explain, on the pocket model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuitsae.attribution import Contrast, DirectionTarget, FeatureTarget, LogitTargets, attribute_pruned
from circuitsae.cli import main
from circuitsae.commands.targets import read_vector
from circuitsae.graph import load_graph
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from circuitsae.report.data import page_data
from circuitsae.report.index import write_index

PROMPT = "When John and Mary went to the store, John gave a drink to"
VECTOR = np.linspace(-1.0, 1.0, 128)


@pytest.fixture(scope="module")
def pocket():
    return ReplacementModel(load_model("pocket"), load_dictionaries("pocket"))


@pytest.fixture
def trace(pocket, monkeypatch, tmp_path):
    """Runs the command in a folder of its own, with the model loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("circuitsae.commands.graphs.load_replacement", lambda *_: pocket)
    np.save("probe.npy", VECTOR)
    return lambda *arguments: main(["trace", PROMPT, "--validate", "0", "--out", "g", *arguments])


ASKED = {
    "contrast": (("--contrast", " Mary", " John"), Contrast(" Mary", " John"), "·Mary − ·John", "the difference ·Mary"),
    "token": (("--target", " Mary", "--position", "-3"), LogitTargets([" Mary"], position=12), "·Mary", "·Mary, "),
    "feature": (("--target-feature", "2.602@14"), FeatureTarget(2, 602), "2.602@14", "the pre-activation of 2.602@14"),
    "direction": (
        ("--direction", "probe.npy", "--direction-site", "1.mlp_in", "--position", "6"),
        DirectionTarget(VECTOR, "1.mlp_in", 6, "probe"), "probe", "what probe reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_the_graph_is_that_of_the_library_and_shown_by_its_name(pocket, trace, asked, capsys, tmp_path):
    arguments, targets, name, said = ASKED[asked]
    trace(*arguments)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"│ {name} │" in printed
    assert f"Of {said}" in printed or f"Of the logit of {said}" in printed
    found = load_graph("g")
    expected, _ = attribute_pruned(pocket, PROMPT, targets=targets)
    assert [node.id for node in found.nodes] == [node.id for node in expected.nodes]
    assert abs(found.weights - expected.weights).max() <= 1e-6 * abs(expected.weights).max()
    if asked != "token":
        (row,) = page_data(found)["explained"]
        assert found.nodes[row].explained
        assert "1 explained" in printed
        assert f'"logit": "{name}"' in json.dumps(_rows(tmp_path), ensure_ascii=False)


def _rows(folder):
    text = write_index(folder).read_text()
    start = text.index(">", text.index('id="index-data"')) + 1
    return json.loads(text[start : text.index("</script>", start)])


def test_a_page_that_compares_two_contrasts_names_them(trace, capsys):
    trace("--contrast", " Mary", " John", "--out", "a")
    shutil.copytree("a", "b")
    main(["compare", "a", "b", "--out", "pair.html"])
    assert "are in both graphs" in capsys.readouterr().out
    main(["show", "a"])
    assert "Of the difference ·Mary − ·John" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--contrast", " Mary", " John", "--target", " Mary"), "--target and --contrast exclude each other"),
        (("--target-feature", "2.602@14", "--direction", "probe.npy"), "--target-feature and --direction exclude"),
        (("--target-feature", "tok@3"), "'tok@3' is no feature at a position"),
        (("--target-feature", "2.602@IO"), "'2.602@IO' is no feature at a position"),
        (("--target-feature", "2.602@14", "--position", "3"), "names a position already"),
        (("--direction-site", "1.mlp_in"), "give --direction as well"),
        (("--direction", "probe.txt"), "no .npy, .json or .safetensors file"),
        (("--direction", "none.npy"), "none.npy cannot be read as a vector"),
        (("--direction", "probe.npy", "--direction-site", "1.attn_out"), "'1.attn_out' is neither"),
        (("--contrast", " Mary", " Mary"), "give two different tokens"),
        (("--contrast", " Mary", "not one token"), "not one token"),
        (("--position", "15"), "Position 15 is not in the prompt, which has 15 tokens"),
        (("--target-feature", "2.0@3"), "Feature 2.0 is not active at position 3 (·and)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_is_one_sentence(trace, capsys, tmp_path, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        trace(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "g").exists()


def test_a_direction_is_read_from_each_kind_of_file(tmp_path):
    tensor = torch.from_numpy(VECTOR)
    save_file({"w": tensor[None]}, tmp_path / "v.safetensors")
    (tmp_path / "v.json").write_text(json.dumps(VECTOR.tolist()))
    np.save(tmp_path / "v.npy", VECTOR.astype(np.float32))
    for name, tolerance in (("v.safetensors", 0), ("v.json", 0), ("v.npy", 1e-7)):
        np.testing.assert_allclose(read_vector(tmp_path / name), VECTOR, rtol=0, atol=tolerance)
