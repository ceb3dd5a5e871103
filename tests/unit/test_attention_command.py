"""`circuitsae attention`: which heads look where, and why."""

import json

import pytest

from circuitsae.cli import main

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command on the prompt; what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setenv("COLUMNS", "120")
        main(["attention", PROMPT, *arguments])
        return capsys.readouterr().out

    return run


def test_without_a_head_it_says_which_look_there(call):
    printed = call("--key", "10", "--top", "2")
    assert "10:·John" in printed
    assert [line.split()[1] for line in printed.splitlines() if "0.9" in line] == ["1.1", "2.2"]
    heads = json.loads(call("--key", "10", "--json"))
    assert [heads[0][name] for name in ("layer", "head")] == [1, 1]
    assert heads[0]["pattern"] > heads[1]["pattern"] > 0.9


def test_a_score_is_split_and_its_features_are_named(call):
    printed = call("--head", "1.1", "--key", "10", "--against", "4")
    assert "Head 1.1 looks from 14 (·to) to 10 (·John)" in printed
    assert "more than to 4 (·Mary)" in printed
    for line in (
        "By what wrote the query",
        "By what wrote the key",
        "By kinds of sources",
        "By pairs",
        "Daniel / Emma",
    ):
        assert line in printed


def test_json_has_the_same(call):
    whole = json.loads(call("--head", "1.1", "--key", "10", "--writers", "--json", "--top", "3"))
    assert len(whole["pairs"]) == len(whole["by_key"]) == 3
    total = sum(value for row in whole["by_kind"].values() for value in row.values())
    assert total + whole["constant"] == pytest.approx(whole["score"], abs=1e-4)
    assert "head" in whole["by_kind"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "x", "--key", "3"], "--head 'x' is no head"),
        (["--head", "9.9", "--key", "3"], "no head 9.9"),
        (["--key", "15"], "no key position 15"),
        (["--key", "3", "--query", "2"], "Position 2 cannot look to 3"),
        (["--key", "3", "--top", "0"], "--top 0 prints nothing"),
        (["--key", "3", "--against", "2"], "give --head LAYER.HEAD"),
    ],
)
def test_wrong_use_is_one_sentence(call, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
