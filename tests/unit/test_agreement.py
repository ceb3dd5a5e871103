"""Derivatives of dictionaries and of held models against autograd in float64, and agreement where it is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional

from circuitsae import attribute, validate
from circuitsae.graph import load_graph
from circuitsae.pocket.corpus import held_out_text
from circuitsae.replacement import ReplacementModel
from circuitsae.report.data import page_data
from circuitsae.report.passing import of_passing
from circuitsae.sentences import of_graph
from circuitsae.validation import Validation
from transcoders import (
    Site,
    Transcoder,
    TranscoderSet,
    evaluate,
    load_dictionaries,
    random_dictionaries,
    random_model,
    save_dictionaries,
)
from transcoders.data import take_rows
from transcoders.dictionaries import CrossLayerTranscoder, DictionaryProvenance, ReLU
from transcoders.dictionaries.held import HeldFeatures
from transcoders.dictionaries.provenance import AGREEMENT
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation import Evaluation, load_evaluation
from transcoders.evaluation.agreement import jacobian_agreement, no_agreement
from transcoders.evaluation.agreement_result import Agreement, Passed
from transcoders.formats.native import native_id
from transcoders.held import EMBED, HeldModel
from transcoders.training.record import record_evaluation

N_LAYERS, D_MODEL = 3, 16
SIZES: Any = {"n_layers": N_LAYERS, "d_model": D_MODEL, "dtype": torch.float64}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivative(function, at, direction) -> Tensor:
    _, found = functional.jvp(function, at, direction)
    assert isinstance(found, Tensor)
    return found


def model_of(family, n_layers=N_LAYERS, seed=2):
    sizes = {"n_layers": n_layers, "d_model": D_MODEL, "n_heads": 2, "d_vocab": 40, "context": 16}
    return random_model(family, **sizes, dtype=torch.float64, seed=seed)


ROWS = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(4))


# dictionaries


def dense(dictionaries, reads):
    """The reconstruction, from the classes' own dense formula."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        return dictionaries(reads)
    return torch.stack([one(read) for one, read in zip(dictionaries.layers, reads, strict=True)])


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "groupmax", "jumptopk"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_held_features_are_the_derivative(kind, skip, activation):
    dictionaries = random_dictionaries(kind, features=32, activation=activation, skip=skip, **SIZES)
    reads, v = draw(2, N_LAYERS, 7, D_MODEL).unbind(0)
    expected = derivative(lambda x: dense(dictionaries, x), reads, v)
    found = HeldFeatures(dictionaries, reads).joint(v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    in_rows = HeldFeatures(dictionaries, reads.unflatten(1, (7, 1))).joint(v.unflatten(1, (7, 1)))
    assert torch.equal(in_rows[:, :, 0], found)


def test_tokens_without_features_pass_on_the_skip_term_alone():
    plt = random_dictionaries("plt", skip=True, **SIZES)
    reads, v = draw(2, N_LAYERS, 4, D_MODEL).unbind(0)
    has = torch.tensor([True, False, True, False])
    found, whole = HeldFeatures(plt, reads, has).joint(v), HeldFeatures(plt, reads).joint(v)
    past = torch.stack([v[layer] @ W_skip for layer in range(N_LAYERS) if (W_skip := plt.skip(layer)) is not None])
    torch.testing.assert_close(found, torch.where(has[:, None], whole, past), rtol=1e-12, atol=1e-12)


def test_features_are_looked_for_a_few_tokens_at_a_time(monkeypatch):
    clt = random_dictionaries("clt", activation="topk", **SIZES)
    reads, v = draw(2, N_LAYERS, 7, D_MODEL).unbind(0)
    whole = HeldFeatures(clt, reads).joint(v)
    monkeypatch.setattr("transcoders.dictionaries.held._ENCODED_VALUES", 3 * 64 * N_LAYERS)
    torch.testing.assert_close(HeldFeatures(clt, reads).joint(v), whole, rtol=1e-12, atol=1e-12)


# models


def held_by_autograd(model, rows, held, of):
    """What the sites `of` hold as functions of embeddings and of what the MLPs are given beside, constants held."""
    names = {site: model.hook(site) for site in of}
    constants = {name: lambda _, value=value: value for name, value in held.constants.items()}

    def run(embed, written):
        beside = {
            model.hook(site): lambda value, change=change: value + change
            for site, change in zip(held.write_sites, written, strict=True)
        }
        hooks = constants | beside | {EMBED: lambda _: embed}
        _, cache = model.run_hooked(rows, read=names.values(), write=hooks)
        return torch.stack([cache[name].flatten(2) for name in names.values()])

    return run


FAMILIES = ["gpt2", "gemma2", "gptj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nudges_are_derivatives_of_the_held_model(family):
    model = model_of(family)
    reads, writes = ([Site(i, kind) for i in range(N_LAYERS)] for kind in ("mlp_in", "mlp_out"))
    held = HeldModel(model, ROWS, reads, writes)
    embed = draw(*held.embed.shape)
    written = draw(*held.clean.writes.shape, seed=1)
    found = held.nudge(embed, written, size=1e-3)
    nothing = torch.zeros_like(written)
    for of, ours in ((reads, found.reads), (writes, found.writes + written)):
        run = held_by_autograd(model, ROWS, held, of)
        expected = derivative(run, (held.embed, nothing), (embed, written))
        assert (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_derivatives_of_each_mlp_by_itself(family):
    model = model_of(family)
    reads, writes = ([Site(i, kind) for i in range(N_LAYERS)] for kind in ("mlp_in", "mlp_out"))
    held = HeldModel(model, ROWS, reads, writes)
    v = draw(*held.clean.reads.shape)
    found = held.respond(v, size=1e-4)
    constants = {name: lambda _, value=value: value for name, value in held.constants.items()}
    for layer in range(N_LAYERS):
        read, write = model.hook(reads[layer]), model.hook(writes[layer])

        def mlp(x, read=read, write=write):
            _, cache = model.run_hooked(ROWS, read=[write], write=constants | {read: lambda _: x})
            return cache[write]

        expected = derivative(mlp, held.clean.reads[layer], v[layer])
        assert (found[layer] - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(("kind", "skip"), [("plt", True), ("clt", False)])
def test_through_is_what_the_replacement_model_does_of_a_change(kind, skip):
    """Features computed anew in a run with errors constant, which is linear as long as the same ones are active."""
    model = model_of("gpt2")
    dictionaries = random_dictionaries(kind, skip=skip, **SIZES).requires_grad_(False)
    replaced, tokens = ReplacementModel(model, dictionaries), ROWS[0]
    trace, size = replaced.trace(tokens), 1e-7
    held = HeldModel(model, tokens[None], dictionaries.reads, dictionaries.writes)
    features = HeldFeatures(dictionaries, held.clean.reads, ~trace.exact[None])
    embed = torch.zeros_like(held.embed)
    embed[0, 4] = draw(D_MODEL)
    constants = {name: lambda _, value=value: value for name, value in held.constants.items()}
    edits = replaced.edits(trace.exact, trace.errors)
    moved = constants | {EMBED: lambda _: held.embed + size * embed}
    _, at = model.run_to_unembedding(tokens[None], dictionaries.reads, edits, held=moved)
    expected = (torch.stack([at[site] for site in dictionaries.reads]) - held.clean.reads) / size
    found = held.through(features.answers(), embed)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    written = torch.zeros_like(held.clean.writes)
    written[1, 0, 4] = draw(D_MODEL)
    edits = replaced.edits(trace.exact, trace.errors)
    put = edits[dictionaries.writes[1]]

    def beside(value):
        replaced = put(value)
        assert replaced is not None
        return replaced + size * written[1]

    edits = {**edits, dictionaries.writes[1]: beside}
    _, at = model.run_to_unembedding(tokens[None], dictionaries.reads, edits, held=constants)
    expected = (torch.stack([at[site] for site in dictionaries.reads]) - held.clean.reads) / size
    found = held.through(features.answers(), written=written)
    assert not found[:2].any()
    assert (found - expected).norm() < 1e-6 * expected.norm()


# agreement


def exact_dictionaries(model, kind="plt", size=1.0):
    """Those of OPT: its MLPs are transcoders themselves, `ReLU(x W_in + b_in) W_out + b_out`."""
    weights = dict(model.bridge.named_parameters())

    def of(layer, name):
        part, kind = name.split(".")
        return weights[f"model.decoder.layers.{layer}._original_component.{part}._original_component.{kind}"].detach()

    parts: list[dict[str, Tensor]] = [
        {"W_enc": of(i, "fc1.weight").T, "b_enc": of(i, "fc1.bias"),
         "W_dec": size * of(i, "fc2.weight").T, "b_dec": of(i, "fc2.bias")}
        for i in range(model.n_layers)
    ]  # fmt: skip
    provenance = DictionaryProvenance(model=model.name)
    if kind == "plt":
        layers: list[Any] = [
            {**part, "read": Site(i, "mlp_in"), "write": Site(i, "mlp_out")} for i, part in enumerate(parts)
        ]
        return TranscoderSet([Transcoder(**layer, activation=ReLU()) for layer in layers], provenance)
    n = model.n_layers
    W_dec = [
        torch.cat([part["W_dec"][:, None], torch.zeros(32, n - 1 - i, D_MODEL).double()], 1)
        for i, part in enumerate(parts)
    ]
    stacked: Any = {name: torch.stack([part[name] for part in parts]) for name in ("W_enc", "b_enc", "b_dec")}
    return CrossLayerTranscoder(**stacked, W_dec=W_dec, activation=ReLU(), provenance=provenance)


def passed_on(agreement, kind) -> list[Passed]:
    """Of one kind of change, in every layer."""
    found = [getattr(layer, kind) for layer in agreement.layers]
    assert all(isinstance(passed, Passed) for passed in found)
    return found


def figures(agreement, name):
    kinds = ("natural", "feature", "random")
    return [getattr(getattr(layer, kind), name) for layer in agreement.layers for kind in kinds if getattr(layer, kind)]


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("size", [1.0, 0.5])
def test_dictionaries_that_are_the_mlps_agree(kind, size):
    """And half of an MLP passes on half of a change, in its own direction."""
    model = model_of("opt")
    found = jacobian_agreement(model, exact_dictionaries(model, kind, size), ROWS, nudges=2)
    assert figures(found, "cosine") == pytest.approx([1.0] * len(figures(found, "cosine")), abs=1e-4)
    assert figures(found, "norm_ratio") == pytest.approx([size] * len(figures(found, "norm_ratio")), abs=1e-3)
    assert [layer.feature is None for layer in found.layers] == [True, False, False]
    assert len(found.hops) == N_LAYERS
    assert found.hops[0].cosine == pytest.approx(1, abs=1e-6)
    if size == 1:
        assert found.reach == N_LAYERS - 1
        assert [hop.norm_ratio for hop in found.hops] == pytest.approx([1.0] * N_LAYERS, abs=1e-3)
    else:
        assert all(hop.norm_ratio < 0.99 for hop in found.hops[1:])


def test_natural_agreement_by_hand():
    """One row and one nudge: derivatives by autograd, tokens one by one."""
    model, rows = model_of("gpt2"), ROWS[:1, :5]
    plt = random_dictionaries("plt", skip=True, **SIZES).requires_grad_(False)
    found = jacobian_agreement(model, plt, rows, nudges=1, seed=3)
    held = HeldModel(model, rows, plt.reads, plt.writes)
    run = held_by_autograd(model, rows, held, (*plt.reads, *plt.writes))
    nothing = torch.zeros_like(held.clean.writes)
    matching = []
    for pos in range(1, rows.shape[1]):
        for donor in range(rows.shape[1]):
            embed = torch.zeros_like(held.embed)
            embed[0, pos] = held.embed[0, donor] - held.embed[0, pos]
            if not embed.any():
                continue
            changes = derivative(run, (held.embed, nothing), (embed, nothing))
            reads, writes = changes[:N_LAYERS, 0], changes[N_LAYERS:, 0]
            ours = derivative(lambda x: dense(plt, x), held.clean.reads[:, 0], reads)
            size = writes.norm(dim=-1)
            keep = (size > 1e-3 * size.amax(1, keepdim=True)) & (torch.arange(rows.shape[1]) >= pos)
            cosine = torch.cosine_similarity(ours, writes, dim=-1)
            ratio = ours.norm(dim=-1) / size
            expected = [(float(cosine[i][keep[i]].mean()), float(ratio[i][keep[i]].mean())) for i in range(N_LAYERS)]
            naturals = [(passed.cosine, passed.norm_ratio) for passed in passed_on(found, "natural")]
            matching.append(torch.allclose(torch.tensor(expected), torch.tensor(naturals), atol=1e-4, rtol=0))
    assert sum(matching) == 1


def test_the_outcome_depends_on_the_seed_alone():
    model = model_of("gpt2", seed=1)
    clt = random_dictionaries("clt", **SIZES).requires_grad_(False)
    rows, shares = ROWS[:2], []
    whole = jacobian_agreement(model, clt, rows, nudges=1, seed=1)
    again = jacobian_agreement(model, clt, rows, nudges=1, seed=1, memory=1, advance=shares.append)
    assert shares == [0.5, 0.5]
    assert again.cosine == pytest.approx(whole.cosine, rel=1e-9)
    assert [hop.cosine for hop in again.hops] == pytest.approx([hop.cosine for hop in whole.hops], rel=1e-9)
    assert figures(again, "rows") == figures(whole, "rows")
    assert jacobian_agreement(model, clt, rows, nudges=1, seed=2).cosine != whole.cosine
    assert Agreement.from_json(whole.to_json()) == whole


def test_positions_before_the_first_and_massive_tokens_are_left_out():
    model = model_of("gpt2")
    plt = random_dictionaries("plt", **SIZES).requires_grad_(False)
    all_tokens = passed_on(jacobian_agreement(model, plt, ROWS, nudges=1), "random")
    assert all_tokens[0].rows == ROWS[:, 1:].numel()
    norms = model.activations(ROWS, [Site(0, "mlp_in")])[Site(0, "mlp_in")].norm(dim=-1)[:, 3:]
    limit = float(norms.flatten().sort().values[-2:].mean())
    plt.provenance = DictionaryProvenance(model=model.name, first=3, limits={"0.mlp_in": limit})
    some = passed_on(jacobian_agreement(model, plt, ROWS, nudges=1), "random")
    assert some[0].rows == ROWS[:, 3:].numel() - 1


def test_layers_without_a_dictionary_pass_on_nothing():
    model = model_of("opt")
    whole = exact_dictionaries(model)
    assert isinstance(whole, TranscoderSet)
    found = jacobian_agreement(model, whole.only([0, 2]), ROWS)
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert found.cosine == pytest.approx(1, abs=1e-4)
    lower, upper = passed_on(found, "carried")
    assert lower.cosine == pytest.approx(1, abs=1e-4)
    assert upper.cosine < 0.99


def test_what_has_no_agreement_is_refused_with_the_reason():
    model = model_of("gpt2")
    plt = random_dictionaries("plt", **SIZES)
    assert no_agreement(model, plt) is None
    with pytest.raises(InputError, match="nudges=0"):
        jacobian_agreement(model, plt, ROWS, nudges=0)
    with pytest.raises(InputError, match="rows of 1 tokens"):
        jacobian_agreement(model, plt, ROWS[:, :1])
    plt[1].norm = TokenNorm("layer_norm")
    with pytest.raises(DictionaryError, match="layer 1 reads each token in units of its own"):
        jacobian_agreement(model, plt, ROWS)
    with pytest.raises(DictionaryError, match="layer 1 reads each token in units of its own"):
        HeldFeatures(plt, draw(N_LAYERS, 2, D_MODEL))
    with pytest.raises(DictionaryError, match="replace no MLP"):
        jacobian_agreement(model, random_dictionaries("sae", **SIZES), ROWS)
    narrow = random_model(n_layers=1, d_model=D_MODEL, n_heads=2, dtype="bfloat16")
    reason = no_agreement(narrow, random_dictionaries("plt", n_layers=1, d_model=D_MODEL))
    assert reason is not None
    assert "float32" in reason


# where it is kept


@pytest.fixture(scope="module")
def evaluated():
    model = model_of("gpt2", n_layers=2)
    plt = random_dictionaries("plt", n_layers=2, d_model=D_MODEL, dtype=torch.float64).requires_grad_(False)
    return model, plt, evaluate(model, plt, ROWS, loss_tokens=1, jacobian_tokens=10)


def test_evaluate_measures_it_on_some_of_the_rows(evaluated):
    model, plt, found = evaluated
    assert found.agreement == jacobian_agreement(model, plt, ROWS[[0, 1]])
    for layer, passed in zip(found.layers, found.agreement.layers, strict=True):
        assert (layer.jacobian_cosine, layer.jacobian_ratio) == (passed.natural.cosine, passed.natural.norm_ratio)
    assert found.to_frame()["jacobian_cosine"].mean() == pytest.approx(found.agreement.cosine)
    assert evaluate(model, plt, ROWS, loss_tokens=1, jacobian_tokens=0).agreement is None
    with pytest.raises(InputError, match="jacobian_tokens=-1"):
        evaluate(model, plt, ROWS, jacobian_tokens=-1)


def test_an_evaluation_is_saved_with_it_and_older_ones_load(evaluated, tmp_path):
    found = evaluated[2]
    found.save(tmp_path / "evaluation.json")
    assert load_evaluation(tmp_path / "evaluation.json") == found
    record = found.to_json()
    del record["agreement"]
    for layer in record["layers"]:
        del layer["jacobian_cosine"], layer["jacobian_ratio"]
    old = Evaluation.from_json(record)
    assert old.agreement is None
    assert all(math.isnan(layer.jacobian_cosine) for layer in old.layers)


def test_saes_and_normed_transcoders_are_evaluated_without(caplog):
    model = model_of("gpt2", n_layers=1)
    sizes = {"n_layers": 1, "d_model": D_MODEL, "dtype": torch.float64}
    plt, sae = random_dictionaries("plt", **sizes), random_dictionaries("sae", **sizes)
    for dictionaries, said in ((sae, 0), (plt, 1)):
        plt[0].norm = TokenNorm("layer_norm")
        with torch.no_grad():
            assert evaluate(model, dictionaries, ROWS, loss_tokens=1).agreement is None
        assert caplog.text.count("Jacobian agreement is left out") == said


def test_dictionaries_carry_what_an_evaluation_beside_them_found(evaluated, tmp_path, caplog):
    model, plt, found = evaluated
    save_dictionaries(plt, tmp_path)
    found.save(tmp_path / "evaluation.json", dictionaries_id=native_id(tmp_path))
    loaded = load_dictionaries(tmp_path)
    assert loaded.provenance.agreement == found.agreement.summary()
    said = f"passes on {100 * found.agreement.norm_ratio:.0f} % of a small change"
    replaced = ReplacementModel(model, loaded)
    graph = attribute(replaced, ROWS[0], max_features=4)
    graph.save(tmp_path / "graph")
    read = load_graph(tmp_path / "graph")
    assert said in of_graph(read)
    assert said in page_data(read)["passing"]
    checked = validate(replaced, graph, edges=1, claims=("direct",), controls=1)
    checked.save(tmp_path / "validation.json")
    assert Validation.load(tmp_path / "validation.json").jacobian == found.agreement.summary()
    # Of other dictionaries, which have taken the place of these, or damaged: it says nothing.
    save_dictionaries(plt, tmp_path)
    assert load_dictionaries(tmp_path).provenance.agreement == {}
    (tmp_path / "evaluation.json").write_text("{")
    assert load_dictionaries(tmp_path).provenance.agreement == {}
    assert "left out of account" in caplog.text


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((0.43, 0.44, 0), "passes on 44 % of a small change (cosine 0.43); totals along paths through any MLP are"),
        ((0.8, 0.9, 1), "through more than one MLP are not to be trusted."),
        ((0.8, 0.9, 2), "through more than 2 MLPs are not to be trusted."),
        ((0.99, 1.0, 3), "totals along all its paths keep a cosine of .9"),
        ((None, 1.0, 3), ""),
        (("a", 1.0, 3), ""),
        ((1e99, 1.0, 3), ""),
    ],
)
def test_a_sentence_says_how_far_totals_can_be_trusted(figures, said):
    agreement = dict(zip(("cosine", "norm_ratio", "reach"), figures, strict=True), measured=3)
    text = of_passing({"dictionaries": {"agreement": agreement}})
    assert said in text
    assert bool(said) == bool(text)


def test_nothing_is_said_of_what_was_not_measured():
    assert [of_passing(given) for given in ({}, {"dictionaries": {}}, {"dictionaries": "x"})] == [""] * 3


def test_the_readme_of_a_run_gets_the_latest_evaluation(evaluated, tmp_path):
    found = evaluated[2]
    record_evaluation(tmp_path, found)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# plt of x\n\n## What next\n\nrun it\n")
    record_evaluation(tmp_path, found)
    once = (tmp_path / "README.md").read_text()
    record_evaluation(tmp_path, found)
    assert (tmp_path / "README.md").read_text() == once
    layer = found.layers[1]
    assert f"| {layer.jacobian_cosine:.3f} | {layer.jacobian_ratio:.3f} |" in once
    assert once.index("## Evaluation") < once.index("## What next")
    assert once.endswith("run it\n")


@pytest.mark.parametrize("name", ["pocket", "pocket-plt"])
def test_the_embedded_dictionaries_ship_theirs(pocket, name):
    """Measured anew on other rows of the same text, and few of them."""
    from circuitsae import load_dictionaries as embedded

    dictionaries = embedded(name)
    rows = take_rows(pocket, held_out_text(600), rows=3, context=96)
    found, shipped = jacobian_agreement(pocket, dictionaries, rows), dictionaries.provenance.agreement
    assert set(shipped) == set(AGREEMENT)
    assert found.cosine == pytest.approx(shipped["cosine"], abs=0.08)
    assert found.norm_ratio == pytest.approx(shipped["norm_ratio"], abs=0.12)
