"""Steering against plain hooks, its controls, its limits, and the features that a contrast finds."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from circuitsae.cli import main
from circuitsae.features import activations_at, contrast, contrast_features, suppress, swap
from circuitsae.interventions import Feature, Prompt, logit_diff
from circuitsae.interventions.controls import matched_features, written_vectors
from circuitsae.interventions.prompts import Recording
from circuitsae.interventions.steering import Direction, Limits, difference_of_prompts, steer
from circuitsae.interventions.steering.report import SteeringReport, distinct_trigrams, tabulate
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model
from transcoders.sites import Site

ROWS = [torch.tensor(row) for row in ([0, 11, 22, 33], [0, 5, 6, 7], [0, 8, 9, 10, 12], [0, 44, 3, 9], [0, 2, 4, 6, 8])]
PROMPTS, HELD_OUT, TEXT = ROWS[:2], ROWS[2:3], ROWS[3:]
METRIC = logit_diff(3, 4)


@pytest.fixture(scope="module", params=["plt", "clt", "sae"])
def model(request):
    sizes = {"n_layers": 2, "d_model": 16, "features": 24, "dtype": torch.float64}
    dictionaries = random_dictionaries(request.param, **sizes, read="resid_mid" if request.param == "sae" else "mlp_in")
    return ReplacementModel(random_model("llama", n_layers=2, d_model=16, dtype=torch.float64), dictionaries)


def sweep(model, what, **settings):
    given = {"prompts": PROMPTS, "held_out": HELD_OUT, "unrelated_text": TEXT, "controls": 2, "n_generate": 4}
    return steer(model, what, metric=METRIC, strengths=[-2.0, 1.0, 3.0], **given | settings)


def hooked(model, tokens, layer, index, amount, where):
    """The logits with `amount · W_dec` written by plain hooks at some positions."""

    def write(at):
        row = model.dictionaries.decoder_rows(layer, torch.tensor([index]), at)[0]
        mask = torch.zeros(len(tokens), 1, dtype=torch.float64)
        mask[where] = 1
        return lambda value: value + amount * mask * row

    edits = {model.dictionaries.writes[at]: write(at) for at in model.dictionaries.write_layers(layer)}
    return model.model.run(tokens[None], edits=edits)[0][0]


@torch.no_grad()
def test_effects_and_side_effects_are_those_of_plain_hooks(model):
    report = sweep(model, Feature(0, 7, at=-1), units=[0.5])
    own = report.effects[report.effects.control < 0].set_index(["set", "prompt", "strength"])
    for name, prompts in (("prompts", PROMPTS), ("held_out", HELD_OUT)):
        for number, tokens in enumerate(prompts):
            clean = model.model.run(tokens[None])[0][0, -1]
            steered = hooked(model, tokens, 0, 7, 3 * 0.5, [-1])[-1]
            expected = float(METRIC(steered) - METRIC(clean))
            assert own.effect[name, number, 3.0] == pytest.approx(expected, abs=1e-9)
    kl, rise, n = 0.0, 0.0, 0
    for tokens in TEXT:
        steered, clean = hooked(model, tokens, 0, 7, 1.5, slice(1, None)), model.model.run(tokens[None])[0][0]
        p, q = clean.log_softmax(-1)[:-1], steered.log_softmax(-1)[:-1]
        kl += float((p.exp() * (p - q)).sum())
        rise += float((p - q).gather(1, tokens[1:, None]).sum())
        n += len(tokens) - 1
    row = report.table[report.table.strength == 3].iloc[0]
    assert (row.kl, row.loss_rise) == (pytest.approx(kl / n, abs=1e-9), pytest.approx(rise / n, abs=1e-9))


@torch.no_grad()
def test_a_direction_is_the_difference_of_means_and_is_added(model):
    direction = difference_of_prompts(model, PROMPTS, TEXT, layer=1, at=-1)
    site = Site(1, "resid_pre")
    ours, theirs = (
        torch.stack([model.model.activations(t[None], [site])[site][0, -1] for t in rows]).mean(0)
        for rows in (PROMPTS, TEXT)
    )
    torch.testing.assert_close(direction.vector, ours - theirs)
    report = sweep(model, direction)
    own = report.effects[(report.effects.control < 0) & (report.effects.strength == -2)]

    def add(value):
        value = value.clone()
        value[:, -1] -= 2 * direction.vector
        return value

    for number, tokens in enumerate(PROMPTS):
        steered = model.model.run(tokens[None], edits={site: add})[0][0, -1]
        found = own.after[(own.set == "prompts") & (own.prompt == number)].item()
        assert found == pytest.approx(float(METRIC(steered)), abs=1e-9)


def test_controls_write_as_much_in_every_layer_and_are_others(model):
    index, amounts = torch.tensor([[0, 3], [0, 4], [1, 5]]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    among = [torch.arange(24) < 12] * 2
    drawn, scaled = matched_features(model, index, amounts, torch.Generator().manual_seed(0), among)
    assert (drawn[:, 0] == index[:, 0]).all()
    assert not set(map(tuple, drawn.tolist())) & set(map(tuple, index.tolist()))
    assert int(drawn[:, 1].max()) < 12
    for layer in (0, 1):
        here = index[:, 0] == layer
        sums = [
            torch.einsum("k,kwd->wd", c[here], written_vectors(model, layer, i[here, 1])).norm()
            for i, c in ((index, amounts), (drawn, scaled))
        ]
        torch.testing.assert_close(*sums)
    with pytest.raises(InputError, match="0 other features"):
        matched_features(model, index, amounts, torch.Generator(), [torch.zeros(24, dtype=torch.bool)] * 2)


def test_strengths_that_change_nothing_do_nothing(model):
    report = steer(model, Feature(1, 2), metric=METRIC, prompts=PROMPTS, held_out=HELD_OUT, unrelated_text=TEXT,
                   strengths=[1.0], push="scale", controls=1, n_generate=3)  # fmt: skip
    assert report.effects.effect.abs().max() < 1e-12
    assert report.table.kl.abs().max() < 1e-12
    assert report.recommended is None
    assert report.generations.text.nunique() <= report.generations.prompt.nunique()


def _table(**columns):
    base = {
        "strength": 1.0,
        "effect": 2.0,
        "control": 0.5,
        "held_out_effect": 1.5,
        "held_out_control": 0.5,
        "broken": "",
    }
    rows = max(len(v) for v in columns.values())
    return pd.DataFrame({**{k: [v] * rows for k, v in base.items()}, **columns})


def _report(table, want="up"):
    frame = pd.DataFrame()
    return SteeringReport("m", "h", "add", (), "metric", want, 1.0, Limits(), table, frame, frame, {})


@pytest.mark.parametrize(
    ("columns", "want", "chosen", "why"),
    [
        ({"strength": [1.0, 2.0], "effect": [2.0, 3.0]}, "up", 2.0, "largest effect"),
        ({"strength": [1.0, 2.0], "effect": [2.0, 3.0], "broken": ["", "loss"]}, "up", 1.0, "largest effect"),
        ({"strength": [1.0], "broken": ["loss"]}, "up", None, "breaks the model"),
        ({"effect": [0.4]}, "up", None, "every control"),
        ({"effect": [2.0]}, "down", None, "every control"),
        ({"effect": [-2.0], "held_out_effect": [-1.0]}, "down", 1.0, "largest effect"),
        ({"effect": [2.0], "held_out_effect": [0.2]}, "up", None, "held-out"),
    ],
)
def test_what_is_recommended(columns, want, chosen, why):
    report = _report(_table(**columns), want)
    assert report.recommended == chosen
    assert why in report.reason


def test_a_strength_that_breaks_the_model_is_flagged(model):
    report = steer(model, Feature(0, 7), units=[1.0], metric=METRIC, prompts=PROMPTS, held_out=HELD_OUT,
                   unrelated_text=TEXT, strengths=[1e-6, 1e4], controls=1, n_generate=3)  # fmt: skip
    gentle, brutal = report.table.broken
    assert gentle == ""
    assert "KL on unrelated text" in brutal
    assert report.recommended != 1e4


def test_limits_name_what_was_passed():
    limits, fine = Limits(loss=0.1, kl=0.5, distinct=0.5), {"clean_distinct": 1.0, "clean_loss": 2.0}
    assert limits.passed(loss_rise=0.1, kl=0.1, distinct=0.9, **fine) == ""
    assert "loss" in limits.passed(loss_rise=float("nan"), kl=0.1, distinct=0.9, **fine)
    assert "repeat" in limits.passed(loss_rise=0.1, kl=0.1, distinct=0.4, **fine)
    assert distinct_trigrams([[1, 2, 3, 1, 2, 3], [1, 1]]) == pytest.approx((3 / 4 + 1) / 2)
    with pytest.raises(InputError, match="limits"):
        Limits(kl=-1.0)


def test_a_table_keeps_the_strongest_control():
    effects = pd.DataFrame(
        [("prompts", 0, c, 1.0, e) for c, e in ((-1, 2.0), (0, -3.0), (1, 1.0))]
        + [("held_out", 0, c, 1.0, e) for c, e in ((-1, 1.0), (0, 0.5), (1, 0.1))],
        columns=["set", "prompt", "control", "strength", "effect"],
    )
    side = pd.DataFrame({"control": [-1, 0, 1], "strength": 1.0, "kl": [0.1, 0.2, 0.4], "loss_rise": [0.0, 0.1, 0.3]})
    written = pd.DataFrame({"strength": [float("nan"), 1.0], "tokens": [[1, 2, 3], [1, 2, 3]]})
    row = tabulate(effects, side, written, clean_loss=2.0, limits=Limits()).iloc[0]
    assert (row.effect, row.control, row.held_out_control) == (2.0, 3.0, 0.5)
    assert row.control_kl == pytest.approx(0.3)


def test_report_is_json_a_figure_and_an_offline_page(model, tmp_path):
    report = sweep(model, [Feature(0, 7), Feature(1, 3)], metric_name="<b>metric</b>", command="circuitsae steer <x>")
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["format"] == "circuitsae-steering/1"
    assert len(document["effects"]) == 3 * 3 * 3  # prompts, direction and controls, strengths
    assert len(list(report.to_figure().data)) == 2 * (1 + 2) + 5
    page = report.save(tmp_path).read_text(encoding="utf-8")
    assert "<b>metric</b>, wanted" not in page
    assert "circuitsae steer &lt;x&gt;" in page
    assert 'src="http' not in page
    assert set(report.side_by_side(1.0).columns) == {"prompt", "before", "after"}


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        (Feature(0, 99), {}, r"no feature 0\.99: .* layers 0 to \d+ .* give LAYER\.INDEX"),
        ([], {}, "nothing to steer by"),
        (Feature(0, 1), {"prompts": []}, "no prompts"),
        (Feature(0, 1), {"units": [1.0, 2.0]}, "as many units"),
        ([Feature(0, 1, 1), Feature(0, 1, 2)], {}, "named twice"),
        (Direction(0, "resid_pre", torch.ones(16, dtype=torch.float64)), {"push": "scale"}, "A direction is added"),
        (Feature(0, 1), {"controls": 0}, "controls=0"),
    ],
)
def test_wrong_use_is_one_sentence(model, what, settings, message):
    with pytest.raises(InputError, match=message):
        sweep(model, what, **settings)


def test_held_out_prompts_and_side_effects_are_options(model, tmp_path):
    full, plain = sweep(model, Feature(0, 7), units=[1.0]), sweep(
        model, Feature(0, 7), units=[1.0], held_out=[], unrelated_text=[]
    )  # fmt: skip
    of_prompts = full.effects[(full.effects.set == "prompts") & (full.effects.control < 0)]
    assert plain.effects[plain.effects.control < 0].after.tolist() == of_prompts.after.tolist()
    assert plain.table[["held_out_effect", "held_out_control", "kl", "loss_rise"]].isna().to_numpy().all()
    assert plain.table.broken.map(lambda said: "loss" not in said and "KL" not in said).all()
    best = plain.recommended
    assert best is None or "not tested on held-out prompts; side effects not measured" in plain.reason
    document = json.loads((plain.save(tmp_path).parent / "steering.json").read_text())
    assert document["clean_loss"] is None
    assert "0 unrelated texts, " in (tmp_path / "steering.html").read_text()


# contrast


@torch.no_grad()
def test_a_contrast_is_the_difference_of_mean_activations(model):
    own, others = PROMPTS + HELD_OUT, TEXT
    dense = {}
    for name, rows in (("own", own), ("others", others)):
        traces = [model.trace(row) for row in rows]
        dense[name] = torch.zeros(len(rows), 2, 24, dtype=torch.float64)
        for i, trace in enumerate(traces):
            index, value = trace.features
            here = index[:, 1] == len(rows[i]) - 1
            dense[name][i, index[here, 0], index[here, 2]] = value[here]
    group = contrast_features(model, own, others, k=5, rate=0.5)
    norm = torch.stack([written_vectors(model, i, torch.arange(24)).flatten(1).norm(dim=1) for i in (0, 1)])
    score = (dense["own"].mean(0) - dense["others"].mean(0)) * norm
    score[(dense["own"] > 0).double().mean(0) < 0.5] = 0
    torch.testing.assert_close(group.score, score.flatten().topk(5).values)
    layer, feature = group.index.unbind(1)
    torch.testing.assert_close(group.mean, dense["own"].mean(0)[layer, feature])
    assert list(group.frame().columns) == ["layer", "feature", "mean", "against", "rate", "score"]


def test_suppress_and_swap_set_what_they_say(model):
    prompt = Recording(model, Prompt(PROMPTS[0], {"here": 2}))
    named = [Prompt(row, {"here": 2}) for row in ROWS]
    read = activations_at(model, named, "here")
    first = torch.tensor([True, False, False, False, False])
    group, other = (contrast(model, read, mask, ~mask, at="here", k=4) for mask in (first, first.roll(1)))
    change = suppress(prompt, group, -1.0)
    torch.testing.assert_close(change.amount, -2 * prompt.activations(change.index))
    swapped = swap(prompt, group, other, factor=0.0, strength=3.0)
    after = prompt.activations(swapped.index) + swapped.amount
    wanted = {tuple(pair): 3 * value for pair, value in zip(other.index.tolist(), other.mean.tolist(), strict=True)}
    for (layer, pos, feature), value in zip(swapped.index.tolist(), after.tolist(), strict=True):
        assert pos == 2
        assert value == pytest.approx(wanted.get((layer, feature), 0.0), abs=1e-12)
    assert len({tuple(row) for row in swapped.index.tolist()}) == len(swapped.index)
    with pytest.raises(InputError, match="both sides"):
        contrast(model, read, first & ~first, first, at="here")
    with pytest.raises(InputError, match="no role 'there'"):
        activations_at(model, named, "there")


# the pocket model


@pytest.fixture(scope="module")
def steered():
    return ReplacementModel(load_model("pocket"), load_dictionaries("pocket"))


def test_a_pronoun_is_steered_on_held_out_names(steered):
    phrase = "When {} was seven years old,"
    women, men, kept = (
        [phrase.format(n) for n in names]
        for names in (["Mary", "Anna", "Alice", "Jane"], ["John", "David", "Paul", "Mark"], ["Peter", "Henry"])
    )
    found = contrast_features(steered, women, men, k=5)
    she, he = (steered.model.token_id(word) for word in (" she", " he"))
    report = steer(steered, found.features(), units=found.mean.tolist(), metric=logit_diff(she, he), prompts=men[:2],
                   held_out=kept, unrelated_text=["The red apple fell into the river. It is sunny today."],
                   strengths=[-1.0, 1.0, 50.0], controls=3, n_generate=4)  # fmt: skip
    assert report.recommended == 1.0
    assert report.table.set_index("strength").broken[50.0]


def test_two_hops_go_through_the_state():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        from two_hop import two_hop  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    table = two_hop(quick=True).groupby("change")[["moved", "to_other"]].mean()
    assert table.moved["suppressed"] >= 0.9
    assert table.to_other["swapped"] >= 0.6
    assert table.moved["suppressed, control"] <= 0.4
    assert table.to_other["swapped, control"] <= 0.1


def test_the_command_prints_and_writes(capsys, tmp_path):
    men = tmp_path / "men.txt"
    men.write_text("When John was seven years old,\nWhen David was seven years old,\n")
    common = ["steer", "--target", " she", "--against", " he", str(men), "--held-out",
              "When Peter was seven years old,", "--strengths", "-1", "--strengths", "1", "--controls", "1",
              "--texts", "1", "--context", "24", "--generate", "3"]  # fmt: skip
    main(
        [
            *common,
            "--toward",
            "When Mary was seven years old,",
            "--away",
            str(men),
            "--layer",
            "3",
            "--out",
            str(tmp_path),
        ]
    )
    assert "Recommended strength: 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "steering.json").read_text())["recommended"] == 1.0
    for arguments, message in (
        ([], "Steer by --feature"),
        (["--feature", "2.err"], "is no feature"),
        (["--feature", "3.606", "--held-out", "When John was seven years old,"], "held-out prompts must be others"),
        (["--toward", "When Mary was", "--away", str(men)], "give --layer N"),
    ):
        with pytest.raises(SystemExit):
            main([*common, *arguments])
        assert message in " ".join(capsys.readouterr().err.split())
