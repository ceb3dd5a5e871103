"""`circuitsae intervene` on the pocket model."""

import json

import pytest
import torch

from circuitsae.cli import main
from circuitsae.interventions import MLP, Intervention, Zero, intervene
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel

PROMPT = "When John and Mary went to the store, John gave a drink to"


def _call(*arguments):
    main(["intervene", PROMPT, *arguments])


def test_the_numbers_are_those_of_the_library(capsys):
    _call("--feature", "2.mlp", "--zero", "--json", "--top", "3", "--generate", "2", "--dtype", "float64")
    document = json.loads(capsys.readouterr().out)
    model = ReplacementModel(load_model("pocket", dtype=torch.float64), load_dictionaries("pocket"))
    outcome = intervene(model, PROMPT, [Intervention(MLP(2), Zero())])
    first = int(outcome.clean[0, -1].argmax())
    effect = float(outcome.changed[0, 0, -1, first] - outcome.clean[0, -1, first])
    assert document["metric"]["effect"] == pytest.approx(effect, abs=1e-9)
    assert document["top"][0]["token"] == int(outcome.changed[0, 0, -1].argmax())
    assert len(document["generation"]["rows"]) == 2


def test_tables_metric_and_audit_are_printed(capsys):
    _call("--feature", "1.5@3", "--feature", "2.7", "--set", "8", "--regime", "frozen", "--audit", "--target", " Mary",
          "--against", " John")  # fmt: skip
    printed = capsys.readouterr().out
    assert "logit(·Mary) − logit(·John)" in printed
    assert "13 frozen values" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing was named to change"),
        (["--feature", "1.5@3"], "Give exactly one of"),
        (["--feature", "1.5@3", "--zero", "--add", "3"], "got --zero, --add"),
        (["--feature", "one", "--zero"], "LAYER.INDEX@POSITION"),
        (["--feature", "1.mlp", "--add", "3"], "only features have numbers"),
        (["--feature", "1.5", "--zero", "--regime", "frozen", "--generate", "3"], "--generate writes in the regime"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        _call(*arguments)
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
