"""The commands that a page shows: what they load, and that nothing a graph says becomes another command."""

import ast
import shlex
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from circuitsae.graph.totals import explained_rows, foreseen, total_effects
from circuitsae.report.commands import GRAPH_FOLDER, commands_data, quote
from tests.sample_graphs import SampleGraph, sample_graph, small_graph

PROMPT = "The capital of the state containing Dallas is"
HOSTILE = [
    "$(touch owned); `touch owned` | \\ ' \" ! & > < * ~",
    "two\nlines\r\tand \x1b]0;a title\x07",
    "\u202eright to left\u202c, line\u2028separator",
    "'; rm -rf ~; echo '",
    "</script><img src=x onerror=alert(1)>",
    "שלום عالم 👩‍🔬",
    "a" * 10_000,
    "",
]


def graph(prompt: str | None = PROMPT, **provenance: object) -> SampleGraph:
    made = sample_graph(n_features=5, n_edges=20)
    return replace(made, provenance={"model": "pocket", "prompt": prompt, **provenance})


def shell(found, what: str, middle: str) -> list[str]:
    before, after = found[what]["shell"]
    return shlex.split(f"{before}{middle}{after}")


def bash_words(command: str) -> list[str]:
    """What bash makes of a command's words."""
    listed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, cwd="/"
    ).stdout
    return listed.decode().split("\0")[:-1]


def test_the_command_names_prompt_model_and_dictionaries_once_for_all_nodes():
    source = {
        "model": "gpt2",
        "dictionaries": "own/sets",
        "revision": "main",
        "layers": "0-2,5",
        "l0": "32",
        "extra": 1,
    }
    found = commands_data(graph(source=source, dtype="float64", bos=False, dictionaries={"bos": True}), "graphs/a b")
    assert found is not None
    assert shell(found, "intervene", " --feature 0.153@8 --zero") == [
        "circuitsae", "intervene", PROMPT, "--feature", "0.153@8", "--zero", "--model", "gpt2",
        "--dictionaries", "own/sets", "--revision", "main", "--layers", "0-2,5", "--l0", "32", "--dtype", "float64",
        "--no-bos",
    ]  # fmt: skip
    expected = ["circuitsae", "validate", "graphs/a b", "--edges", "0.153@8 → 1.2@9"]
    assert shell(found, "validate", "0.153@8 → 1.2@9") == expected
    python = "".join(found["intervene"]["python"])
    assert 'load_model("gpt2", revision="main", dtype="float64")' in python
    assert 'load_dictionaries("own/sets", layers=[*range(0, 3), 5], l0=32), bos=False)' in python


def test_what_is_usual_is_left_out_and_what_is_not_known_is_said():
    found = commands_data(graph(bos=True, dictionaries={"bos": True}))
    assert found is not None
    options = ["--model", "pocket", "--dictionaries", "pocket"]
    assert shell(found, "intervene", "") == ["circuitsae", "intervene", PROMPT, *options]
    assert GRAPH_FOLDER in shell(found, "validate", "")
    other = commands_data(graph(model="gpt2"))
    assert other is not None
    assert "DICTIONARIES" in shell(other, "intervene", "")
    untold = commands_data(graph(prompt=None))
    assert untold is not None
    assert "intervene" not in untold
    assert commands_data(graph(model=7, source=["model"])) is None


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_stay_one_word_in_a_shell_and_one_text_in_python(text: str):
    name = text or "m"
    found = commands_data(graph(text, source={"model": name, "dictionaries": name}), name)
    assert found is not None
    middle = " --feature 0.1@2 --zero"
    words = bash_words(middle.join(found["intervene"]["shell"]))
    assert words[:3] == ["circuitsae", "intervene", text]
    assert words[words.index("--model") + 1] == words[words.index("--dictionaries") + 1] == name
    assert bash_words("a → b".join(found["validate"]["shell"])) == ["circuitsae", "validate", name, "--edges", "a → b"]
    for what in ("intervene", "validate"):
        python = ("[]" if what == "intervene" else "a").join(found[what]["python"])
        constants = [node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)]
        assert text in constants or not text
        assert all(line.isprintable() for one in (python, *found[what]["shell"]) for line in one.split("\n"))
    assert "\n" not in middle.join(found["intervene"]["shell"])


@pytest.mark.parametrize("text", ["--trust-remote-code", "-h"])
def test_a_text_that_looks_like_an_option_is_none(text: str):
    found = commands_data(graph(text, source={"model": text, "dictionaries": "d"}), text)
    assert found is not None
    words = shell(found, "intervene", " --zero")
    assert words[-2:] == ["--", text]
    assert f"--model={text}" in words
    assert text not in words[:-1]
    assert shell(found, "validate", "")[2] == f"./{text}"


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d"])
def test_what_no_shell_can_be_told_is_shown_in_python_alone(text: str):
    assert quote(text) is None
    found = commands_data(graph(text), text)
    assert found is not None
    assert all(set(one) == {"python"} for one in found.values())
    assert ast.parse("[]".join(found["intervene"]["python"]))


def test_total_effects_are_sums_over_paths_and_held_nodes_pass_nothing_on():
    made = small_graph()
    nodes, edges = made.nodes_frame(), made.edges_frame()
    (target,) = explained_rows(nodes)
    token, feature = made.position["tok@0"], made.position["0.7@1"]
    # token → feature 2.0, of an activation of 2; feature → logit 1.0
    assert total_effects(nodes, edges, [target])[0, token] == pytest.approx(2.0 / 2.0 * 1.0)
    assert total_effects(nodes, edges, [target], held=[feature])[0, token] == 0
    assert foreseen(nodes, edges, [target], {token: -1.0}) == pytest.approx([-1.0])
    assert foreseen(nodes, edges, [target], {token: -1.0, feature: 1.0}) == pytest.approx([1.0])
    silent = nodes.assign(activation=np.nan)
    assert total_effects(silent, edges, [target])[0, token] == 0
