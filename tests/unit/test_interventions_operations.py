"""What operations put in a value's place, generation, outcomes and the freeze audit."""

import json

import pytest
import torch

import circuitsae.interventions.forward as running
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import (
    MLP,
    Add,
    Error,
    Feature,
    Features,
    Head,
    Intervention,
    Mean,
    Means,
    Patch,
    Prompt,
    PromptLike,
    Regime,
    Replace,
    ReplaceToken,
    Resample,
    Scale,
    Set,
    Stream,
    Token,
    Zero,
    audit,
    for_node,
    for_nodes,
    generate,
    intervene,
    logit,
    logit_diff,
    parse_target,
    probability,
    target_id,
)
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import CheckFailedError, InputError, PromptError
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS, OTHER = torch.tensor([0, 11, 22, 33, 44]), torch.tensor([0, 7, 9, 5, 3])
ALL_FROZEN = Regime(mlps="constant", patterns="frozen", norms="frozen")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model(request.param, n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


def _run(model, tokens, hooks=None):
    own = [(name, lambda v, hook, f=f: f(v.clone())) for name, f in (hooks or {}).items()]
    return model.model.bridge.run_with_hooks(tokens[None], fwd_hooks=own, prepend_bos=False)[0]


def _logits(model, *interventions, prompt: PromptLike = TOKENS, **options):
    return intervene(model, prompt, list(interventions), logits_at=None, **options).changed[0, 0]


def _active(model, tokens=TOKENS, layer=0):
    index, value = model.trace(tokens).features
    row = int((index[:, 0] == layer).nonzero()[0])
    _, pos, feature = index[row].tolist()
    return Feature(layer, feature, pos), float(value[row])


# operations


def test_a_replaced_token_is_the_model_on_the_other_tokens(model):
    other = TOKENS.clone()
    other[2] = 50
    changed = _logits(model, Intervention(Token(2), ReplaceToken(50)))
    torch.testing.assert_close(changed, _run(model, other))


def test_patching_the_whole_stream_is_the_other_prompt(model):
    patched = _logits(model, Intervention(Stream(1, "resid_pre"), Patch(OTHER)))
    torch.testing.assert_close(patched, _run(model, OTHER))


def test_a_patched_feature_has_the_other_prompts_activation(model):
    feature, value = _active(model, OTHER)
    patched = _logits(model, Intervention(feature, Patch(OTHER)))
    torch.testing.assert_close(patched, _logits(model, Intervention(feature, Set(value))))
    elsewhere = _logits(model, Intervention(Feature(0, feature.index, 4), Patch(OTHER, at=feature.at)))
    torch.testing.assert_close(elsewhere, _logits(model, Intervention(Feature(0, feature.index, 4), Set(value))))


def test_roles_say_where(model):
    here, there = Prompt(TOKENS, {"S": 2, "END": -1}), Prompt(OTHER, {"S": 3})
    z = {}
    _run(model, OTHER, {"blocks.1.attn.hook_z": lambda v: z.setdefault("z", v)})
    by_role = _logits(model, Intervention(Head(1, 2, "S"), Patch(there)), prompt=here)
    torch.testing.assert_close(by_role, _logits(model, Intervention(Head(1, 2, 2), Set(z["z"][0, 3, 2]))))
    end = _logits(model, Intervention(MLP(0, "END"), Zero()), prompt=here)
    torch.testing.assert_close(end, _logits(model, Intervention(MLP(0, 4), Zero())))
    with pytest.raises(InputError, match="no role 'IO'"):
        _logits(model, Intervention(MLP(0, "IO"), Zero()), prompt=here)


@pytest.mark.parametrize("by", ["role", "position", "corpus"])
def test_means_are_means_over_the_positions_that_belong_together(model, by):
    rng = torch.Generator().manual_seed(3)
    tokens = [torch.cat([torch.zeros(1).long(), torch.randint(1, 64, (4,), generator=rng)]) for _ in range(3)]
    prompts = [Prompt(t, {"S": 1 + i}, "t") for i, t in enumerate(tokens)]
    means = Means.over(model, prompts, by=by)
    kept = [model.model.run(t[None], [Site(1, "mlp_out")])[1][Site(1, "mlp_out")][0] for t in tokens]
    expected = {
        "role": torch.stack([k[1 + i] for i, k in enumerate(kept)]).mean(0),
        "position": torch.stack(kept)[:, 2].mean(0),
        "corpus": torch.stack(kept)[:, 1:].flatten(0, 1).mean(0),
    }[by]
    here = Prompt(TOKENS, {"S": 2}, "t")
    changed = _logits(model, Intervention(MLP(1, "S"), Mean(means)), prompt=here)
    torch.testing.assert_close(changed, _logits(model, Intervention(MLP(1, 2), Set(expected))))
    feature, _ = _active(model)
    ablated = _logits(model, Intervention(Feature(0, feature.index, 2), Mean(means)), prompt=here)
    read = [model.trace(t).features for t in tokens]
    dense = torch.zeros(3, 5, dtype=torch.float64)
    for row, (index, value) in enumerate(read):
        same = (index[:, 0] == 0) & (index[:, 2] == feature.index)
        dense[row, index[same][:, 1]] = value[same]
    number = {"role": dense[torch.arange(3), 1 + torch.arange(3)], "position": dense[:, 2], "corpus": dense[:, 1:]}[by]
    expected = _logits(model, Intervention(Feature(0, feature.index, 2), Set(float(number.mean()))))
    torch.testing.assert_close(ablated, expected)


def test_means_of_another_template_are_refused(model):
    means = Means.over(model, [Prompt(OTHER, {"S": 1}, "a")])
    with pytest.raises(InputError, match="nothing for template 'b'"):
        _logits(model, Intervention(MLP(0, "S"), Mean(means)), prompt=Prompt(TOKENS, {"S": 1}, "b"))


def test_resampling_draws_one_prompt_for_all_of_a_run(model):
    pool = [OTHER, OTHER.flip(0), TOKENS]
    two = [Intervention(MLP(0), Resample(pool, 1)), Intervention(Stream(0, "attn_out"), Resample(pool, 1))]
    changed = _logits(model, *two)
    patched = [
        _logits(model, Intervention(MLP(0), Patch(p)), Intervention(Stream(0, "attn_out"), Patch(p))) for p in pool[:2]
    ]
    assert sum(torch.allclose(changed, p) for p in patched) == 1
    with pytest.raises(InputError, match="no prompt but the one it changes"):
        _logits(model, Intervention(MLP(0), Resample([TOKENS])))


def test_a_feature_replaced_by_another(model):
    feature, value = _active(model)
    by = Feature(0, (feature.index + 1) % 24)
    put = Feature(0, by.index, feature.at)
    replaced = _logits(model, Intervention(feature, Replace(by)))
    expected = _logits(model, Intervention(feature, Zero()), Intervention(put, Set(value)))
    torch.testing.assert_close(replaced, expected)
    given = _logits(model, Intervention(feature, Replace(by, 3.0)))
    torch.testing.assert_close(given, _logits(model, Intervention(feature, Zero()), Intervention(put, Set(3.0))))


def test_many_features_are_their_single_interventions(model):
    index = model.trace(TOKENS).features.index[::3]
    together = _logits(model, Intervention(Features(index), Scale(0.3)), regime="replacement")
    singly = [Intervention(Feature(layer, i, pos), Scale(0.3)) for layer, pos, i in index.tolist()]
    torch.testing.assert_close(together, _logits(model, *singly, regime="replacement"))


def test_the_stream_between_attention_and_mlp(model):
    v = torch.randn(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    changed = _logits(model, Intervention(Stream(1, "resid_mid", 2), Add(v)))
    torch.testing.assert_close(changed, _logits(model, Intervention(Stream(1, "attn_out", 2), Add(v))))
    whole = _logits(model, Intervention(Stream(1, "resid_mid"), Patch(OTHER)))
    torch.testing.assert_close(whole, _run(model, OTHER))


@pytest.mark.parametrize("kind", ["mlp_normed", "mlp_neurons", "mlp_added", "attn_added"])
def test_every_site_is_changed_by_its_own_vectors(model, kind):
    lm, site = model.model, Site(1, kind)
    v = torch.randn(lm.width(site), generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def doubled(value):
        return torch.cat([value[:, :3], 2 * value[:, 3:4], value[:, 4:] + v], dim=1)

    changes = [Intervention(parse_target(f"1.{kind}@3"), Scale(2.0)), Intervention(Stream(1, kind, 4), Add(v))]
    expected, _ = lm.run(TOKENS[None], edits={site: doubled})
    torch.testing.assert_close(_logits(model, *changes), expected[0])
    patched = _logits(model, Intervention(Stream(1, kind), Patch(OTHER)))
    theirs = lm.activations(OTHER[None], [site])[site]
    torch.testing.assert_close(patched, lm.run(TOKENS[None], edits={site: lambda _: theirs})[0][0])
    means = Means.over(model, [TOKENS, OTHER], by="position")
    averaged = _logits(model, Intervention(Stream(1, kind), Mean(means)))
    mean = (theirs + lm.activations(TOKENS[None], [site])[site]) / 2
    torch.testing.assert_close(averaged, lm.run(TOKENS[None], edits={site: lambda _: mean})[0][0])


def test_heads_side_by_side_are_changed_one_by_one(model):
    with pytest.raises(InputError, match=r"one by one; take Head\(1, HEAD\)"):
        _logits(model, Intervention(Stream(1, "attn_z", 2), Zero()))


def test_a_vector_of_d_model_is_a_heads_output(model):
    v = torch.randn(16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    changed = _logits(model, Intervention(Head(0, 1, 3), Set(v)))
    zeroed = [Intervention(Head(0, 1, 3), Zero()), Intervention(Stream(0, "attn_out", 3), Add(v))]
    torch.testing.assert_close(changed, _logits(model, *zeroed))


# batches


@pytest.mark.parametrize("regime", ["frozen", "replacement", "frozen-attention", "model"])
def test_prompts_and_alternatives_in_one_batch_are_single_runs(model, regime):
    feature, _ = _active(model)
    alternatives = [
        [Intervention(feature, Zero())],
        [],
        [Intervention(Error(1), Zero()), Intervention(MLP(0, 1), Scale(2.0))],
        [Intervention(Head(2, 0), Resample([TOKENS, OTHER], 4)), Intervention(feature, Add(1.0))],
    ]
    outcome = intervene(model, [TOKENS, OTHER], alternatives, regime=regime)
    few = intervene(model, [TOKENS, OTHER], alternatives, regime=regime, memory=1)
    torch.testing.assert_close(outcome.changed, few.changed)
    for p, tokens in enumerate((TOKENS, OTHER)):
        for a, alternative in enumerate(alternatives):
            alone = intervene(model, tokens, alternative, regime=regime)
            torch.testing.assert_close(outcome.changed[p, a], alone.changed[0, 0])
            assert outcome.changed_reads is not None
            assert alone.changed_reads is not None
            torch.testing.assert_close(outcome.changed_reads.final[p, a], alone.changed_reads.final[0, 0])


def test_an_outcome_measures_its_logits(model):
    outcome = intervene(model, TOKENS, [Intervention(MLP(0), Zero())])
    before, after = outcome.clean[0, -1], outcome.changed[0, 0, -1]
    assert outcome.effect(logit(5))[0, 0] == after[5] - before[5]
    assert float(outcome.effect(logit_diff(5, 6))) == pytest.approx(float(after[5] - after[6] - before[5] + before[6]))
    assert float(outcome.after(probability(5))) == pytest.approx(float(after.softmax(-1)[5]))
    p = before.softmax(-1)
    assert float(outcome.kl()) == pytest.approx(float((p * (p / after.softmax(-1)).log()).sum()))
    top = outcome.top(3)
    assert top["token"].iloc[0] == int(after.argmax())
    assert int(before.argmax()) in top["token"].tolist()
    assert outcome.to_json(3)["alternatives"] == [["0.mlp zero"]]
    was, now = outcome.activation(1, 4)
    torch.testing.assert_close(was[0], outcome.features(1).new_tensor(_dense(model, TOKENS)[1, :, 4].tolist()))
    assert now.shape == (1, 1, 5)


def _dense(model, tokens):
    dense = torch.zeros(3, 5, 24, dtype=torch.float64)
    index, value = model.trace(tokens).features
    dense[tuple(index.unbind(1))] = value
    return dense


# generation


@pytest.mark.parametrize("on", ["all", "prompt", "new"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_a_cache_is_generation_without(model, on, temperature):
    feature, _ = _active(model)
    alternatives = [
        [Intervention(Feature(0, feature.index), Add(4.0)), Intervention(Feature(1, 3), Set(2.0))],
        [Intervention(Head(1, 1), Scale(3.0)), Intervention(MLP(2, (1, 6)), Zero())],
    ]
    options = {"n": 5, "on": on, "temperature": temperature}
    kept = generate(model, TOKENS, alternatives, **options)
    again = generate(model, TOKENS, alternatives, cache=False, **options)
    assert torch.equal(kept.tokens, again.tokens)
    torch.testing.assert_close(kept.logits, again.logits, rtol=1e-9, atol=1e-9)
    clean = _run(model, kept.tokens[0])[4:-1]
    torch.testing.assert_close(kept.logits[0], clean, rtol=1e-9, atol=1e-9)
    assert kept.frame()["alternative"].tolist() == [-1, 0, 1]


def test_generation_acts_where_it_is_told(model):
    """The first new token depends on the prompt's positions only, the last on the new ones too."""
    change = [Intervention(Stream(0, "resid_pre"), Scale(-1.0))]
    logits = {on: generate(model, TOKENS, change, n=2, on=on).logits for on in ("all", "prompt", "new")}
    torch.testing.assert_close(logits["new"][1, 0], logits["new"][0, 0])
    torch.testing.assert_close(logits["all"][1, 0], logits["prompt"][1, 0])
    direct = _run(model, TOKENS, {"blocks.0.hook_in": lambda v: -v})[-1]
    torch.testing.assert_close(logits["all"][1, 0], direct)
    with pytest.raises(PromptError, match="write fewer"):
        generate(model, TOKENS, change, n=100)


# audit


def test_the_audit_lists_what_is_frozen(model):
    feature, _ = _active(model)
    changes = [Intervention(feature, Set(9.0)), Intervention(MLP(0, 2), Zero()), Intervention(Head(1, 1), Zero())]
    frame = audit(model, TOKENS, [*changes, Intervention(Stream(1, "resid_mid", 3), Scale(2.0))], ALL_FROZEN)
    assert set(frame["kind"]) == {"attention pattern", "norm scale", "MLP output"}
    assert max(frame["moved"]) < 1e-9
    assert frame.groupby("kind").size().to_dict() == {"attention pattern": 3, "norm scale": 4, "MLP output": 3}
    assert audit(model, TOKENS, changes, "model").empty


@pytest.mark.parametrize(
    ("name", "said"),
    [("attn.hook_pattern", "attention pattern"), ("ln1.hook_scale", "norm scale"), ("ln2.hook_scale", "norm scale")],
)
def test_the_audit_catches_one_layer_that_is_not_held(model, monkeypatch, name, said):
    held = running.Forward.held
    broken = f"blocks.2.{name}"
    monkeypatch.setattr(running.Forward, "held", lambda self: {k: v for k, v in held(self).items() if k != broken})
    with pytest.raises(CheckFailedError, match=f"The {said} of layer 2 was declared frozen"):
        audit(model, TOKENS, [Intervention(Token(1), Zero())], ALL_FROZEN)


def test_the_audit_follows_heads_and_norms_that_are_live(model, monkeypatch):
    """Those that are held are audited; that the others move is seen in the effect."""
    some = Regime(mlps="constant", patterns=frozenset({(1, 0), (2, 3)}), norms=frozenset({"ln_final.hook_scale"}))
    changes = [Intervention(Token(1), Zero())]
    frame = audit(model, TOKENS, changes, some)
    assert max(frame["moved"]) < 1e-9
    assert frame.groupby("kind").size().to_dict() == {"attention pattern": 3, "norm scale": 3, "MLP output": 3}
    monkeypatch.setattr(running, "_constant_but", lambda live, clean: lambda value: value if live else clean())
    with pytest.raises(CheckFailedError, match="The attention pattern of layer 1 was declared frozen"):
        audit(model, TOKENS, changes, some)


def test_heads_that_are_live_are_named_in_the_file(model):
    some = Regime(patterns=frozenset({(2, 3), (1, 0)}))
    found = json.loads(json.dumps(intervene(model, TOKENS, [], regime=some).to_json()))
    assert found["regime"]["patterns"] == [[1, 0], [2, 3]]


def test_the_audit_catches_an_mlp_that_is_not_held(model, monkeypatch):
    stand_in = running.Forward._stand_in

    def broken(self, layer, mlp_out):
        return mlp_out if layer == 1 else stand_in(self, layer, mlp_out)

    monkeypatch.setattr(running.Forward, "_stand_in", broken)
    with pytest.raises(CheckFailedError, match="The MLP output of layer 1 was declared frozen"):
        audit(model, TOKENS, [Intervention(Token(1), Zero())], ALL_FROZEN)


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.ln1.hook_scale"])
def test_the_audit_catches_a_wrong_constant(model, name):
    """Held, but not at the clean run's value: the reference is a run of its own."""
    trace = model.trace(TOKENS)
    trace.frozen.constants[name] = trace.frozen.constants[name] * 1.01
    with pytest.raises(CheckFailedError, match="layer 1 was declared frozen"):
        audit(model, trace, [], ALL_FROZEN)


# input


def test_targets_are_read_as_they_are_written():
    for text in ("2.713@5", "2.713", "1.err@5", "tok@3", "2.head3@-1", "0.mlp", "1.resid_pre@IO"):
        assert target_id(parse_target(text)) == text
    for text in ("2", "x.3", "2.713@", "2.nothing_here"):
        with pytest.raises(InputError):
            parse_target(text)


def test_nodes_become_interventions():
    nodes = [Node(NodeKind.FEATURE, 1, 2, 3), Node(NodeKind.ERROR, 0, 4), Node(NodeKind.TOKEN, -1, 1, 9)]
    assert [it.target for it in for_nodes(nodes)] == [Feature(1, 3, 2), Error(0, 4), Token(1)]
    with pytest.raises(InputError, match="only features, errors and tokens"):
        for_node(Node(NodeKind.LOGIT, 3, 4, 5))


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ([Intervention(Feature(0, 3, 0), Zero())], "position 0 has no features"),
        ([Intervention(Feature(0, 99, 1), Zero())], "no feature 0.99"),
        ([Intervention(Feature(0, -1, 1), Zero())], "no feature 0.-1"),
        ([Intervention(Feature(7, 3, 1), Zero())], "no layer 7"),
        ([Intervention(MLP(0, 9), Zero())], "beyond the prompt's 5 tokens"),
        ([Intervention(MLP(0, (1, 1)), Zero())], "names a position twice"),
        ([Intervention(Head(0, 9), Zero())], "no head 9"),
        ([Intervention(Head(0, 1), Set(torch.zeros(3)))], "has 4 numbers"),
        ([Intervention(MLP(0, 1), Set(1.0))], "got shape"),
        ([Intervention(MLP(0), ReplaceToken(3))], "only a token can be replaced by a token"),
        ([Intervention(MLP(0), Replace(Feature(0, 1)))], "only a feature can be replaced"),
        ([Intervention(MLP(0, 4), Patch(TOKENS[:3]))], "beyond the source prompt's 3 tokens"),
        ([[], Intervention(MLP(0), Zero())], "not a mixture"),
    ],
)
def test_what_is_not_there_is_refused(model, interventions, message):
    with pytest.raises(InputError, match=message):
        intervene(model, TOKENS, interventions)


def test_prompts_of_several_lengths_and_impossible_regimes_are_refused(model):
    with pytest.raises(InputError, match="must have one length"):
        intervene(model, [TOKENS, TOKENS[:3]], [])
    with pytest.raises(InputError, match="with mlps='features'"):
        intervene(model, TOKENS, [], regime="model", until=1)
