"""Circuits of features in every regime, on several families and kinds of dictionary, against plain runs, in float64.

The oracle knows nothing of the engine: it hooks the bridge itself, one prompt and one circuit at a time, and writes
every feature and error node by itself.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitsae.interventions import Error, Feature, Regime
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import PromptExample, PromptTask
from circuitsae.validation.ablation import Ablated, Kept
from circuitsae.validation.tasks import Cases
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model

LAYERS, FEATURES, VOCAB = 3, 12, 64
KINDS: dict[str, Any] = {
    "gpt2-clt": ("gpt2", {"kind": "clt"}),
    "gpt2-topk": ("gpt2", {"kind": "plt", "activation": "topk"}),
    "gpt2-clt-topk": ("gpt2", {"kind": "clt", "activation": "topk"}),
    "llama-skip": ("llama", {"kind": "plt", "skip": True}),
    "gemma2-mid": ("gemma2", {"kind": "clt", "skip": True, "read": "resid_mid", "write": "mlp_added"}),
    "opt-clt-skip": ("opt", {"kind": "clt", "activation": "jumprelu", "skip": True}),
}
REGIMES = {
    "frozen": Regime(mlps="constant", patterns="frozen", norms="frozen"),
    "graph": Regime(patterns="frozen", norms="frozen"),
    "frozen-replacement": Regime(mlps="features", patterns="frozen", norms="frozen"),
    "replacement": Regime(mlps="features"),
    "until-1": Regime(mlps="features", until=1),
    "frozen-attention": Regime(patterns="frozen"),
    "model": Regime(),
}
NAMED: Any = ("frozen", "graph", "frozen-replacement", "replacement", "frozen-attention", "model")
PROMPTS = [torch.tensor([0, 11, 22, 33, 7]), torch.tensor([0, 12, 23, 33, 8])]
INSIDE = (Feature(0, 3, 1), Feature(0, 5, -1), Error(1, 2), Feature(1, 1), Error(0, 3), Feature(2, 0, 4), Error(2, 4))


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    family, kind = KINDS[request.param]
    language_model = random_model(family, n_layers=LAYERS, d_model=16, n_heads=4, d_vocab=VOCAB, dtype=torch.float64)
    dictionaries = random_dictionaries(
        **kind, n_layers=LAYERS, d_model=16, features=FEATURES, dtype=torch.float64, seed=1
    )
    dictionaries.provenance = replace(dictionaries.provenance, first=2 if family == "gemma2" else 1)
    return ReplacementModel(language_model, dictionaries)


def _hook(model, layer, side):
    """What the dictionary of a layer reads or writes, in the bridge's words; `mlp_added` as Gemma has it."""
    names = {
        "mlp_in": "mlp.hook_in",
        "resid_mid": "ln2.hook_in",
        "mlp_out": "mlp.hook_out",
        "mlp_added": "ln2_post.hook_out",
    }
    return f"blocks.{layer}.{names[getattr(model.dictionaries, side)[layer].kind]}"


@pytest.fixture(scope="module")
def task():
    """The metric is a sum of all logits with random weights, so that none can hide."""
    weight = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return PromptTask([PromptExample(tokens, lambda logits: logits @ weight) for tokens in PROMPTS])


@pytest.fixture(scope="module")
def clean(model):
    """Of each prompt every activation that the oracle holds, the dense features `a` and the error nodes `e`."""
    return [_clean_run(model, tokens) for tokens in PROMPTS]


@torch.no_grad()
def _clean_run(model, tokens):
    kept: dict[str, Any] = {}

    def keep(value, hook):
        kept[hook.name] = value.clone()

    ends = (".hook_pattern", ".hook_scale", "mlp.hook_in", "mlp.hook_out", "ln2.hook_in", "ln2_post.hook_out")
    names = [n for n in model.model.bridge.hook_dict if n.endswith(ends) and not n.startswith("hook")]
    model.model.bridge.run_with_hooks(tokens[None], fwd_hooks=[(n, keep) for n in names], prepend_bos=False)
    reads = [kept[_hook(model, layer, "reads")][0] for layer in range(LAYERS)]
    index, value = model.dictionaries.encode(torch.stack(reads))
    a = torch.zeros(LAYERS, len(tokens), FEATURES, dtype=torch.float64)
    a[tuple(index.T)] = value
    a[:, : model.dictionaries.provenance.first] = 0
    kept["a"] = a
    kept["e"] = [
        kept[_hook(model, layer, "writes")][0] - _reconstruction(model, layer, a, reads[layer])
        for layer in range(LAYERS)
    ]
    return kept


def _reconstruction(model, layer, a, read):
    D = model.dictionaries
    out = D.decoder_bias(layer).repeat(len(read), 1)
    for source in range(LAYERS):
        if layer in D.write_layers(source):
            out = out + a[source] @ D.decoder_rows(source, torch.arange(FEATURES), layer)
    return out if D.skip(layer) is None else out + read @ D.skip(layer)


def _fill(clean, ablation, number):
    """What is put in the place of features and errors; with two prompts the other one is what is resampled from."""
    own, other = clean[number], clean[1 - number]
    errors, theirs = torch.stack(own["e"]), torch.stack(other["e"])
    if ablation == "zero":
        return torch.zeros_like(own["a"]), torch.zeros_like(errors)
    if ablation == "resample":
        return other["a"], theirs
    return (own["a"] + other["a"]) / 2, (errors + theirs) / 2


def _inside(kept, first, length):
    """(layer, pos, feature) and (layer, pos) of what stays."""
    features, errors = set(), set()
    for node in kept.nodes:
        for pos in range(first, length) if node.at is None else [node.at % length]:
            if pos < first:
                continue
            if isinstance(node, Feature):
                features.add((node.layer, pos, node.index))
            else:
                errors.add((node.layer, pos))
    if not kept.all_but:
        return features, errors
    everything = [(layer, pos) for layer in range(LAYERS) for pos in range(first, length)]
    whole = {(*place, index) for place in everything for index in range(FEATURES)}
    return whole - features, set(everything) - errors


@torch.no_grad()
def _oracle(model, tokens, clean, regime, kept, fill):
    """Logits of the last position of one prompt with all outside of one circuit ablated."""
    D, length, first = model.dictionaries, len(tokens), model.dictionaries.provenance.first
    features, errors = _inside(kept, first, length)
    value, reads = {}, {}

    def read(layer):
        def hook(mlp_in, hook):
            reads[layer] = mlp_in[0].clone()
            if regime.mlp(layer) == "constant" or _over_layers(model):
                value[layer] = clean["a"][layer]
            else:
                value[layer] = D.activations(layer, mlp_in[0])

        return hook

    def write(layer):
        def hook(mlp_out, hook):
            mode, out = regime.mlp(layer), mlp_out.clone()
            if mode == "constant":
                out = clean[hook.name].clone()
                if D.skip(layer) is not None:
                    out[0] += (reads[layer] - clean[_hook(model, layer, "reads")][0]) @ D.skip(layer)
            if mode == "features":
                padded = [value.get(source, clean["a"][source]) for source in range(LAYERS)]
                out[0, first:] = (_reconstruction(model, layer, padded, reads[layer]) + clean["e"][layer])[first:]
            for source in range(layer + 1):
                if layer not in D.write_layers(source):
                    continue
                rows = D.decoder_rows(source, torch.arange(FEATURES), layer)
                for pos in range(first, length):
                    for index in range(FEATURES):
                        if (source, pos, index) not in features:
                            out[0, pos] += (fill[0][source, pos, index] - value[source][pos, index]) * rows[index]
            for pos in range(first, length):
                if (layer, pos) not in errors:
                    out[0, pos] += fill[1][layer, pos] - clean["e"][layer][pos]
            return out

        return hook

    held = [
        (name, lambda _, hook: clean[hook.name].clone())
        for name in clean
        if (name.endswith("pattern") and regime.patterns == "frozen")
        or (name.endswith("scale") and regime.norms == "frozen")
    ]
    hooks = [(_hook(model, layer, "reads"), read(layer)) for layer in range(LAYERS)]
    hooks += [(_hook(model, layer, "writes"), write(layer)) for layer in range(LAYERS)]
    return model.model.bridge.run_with_hooks(tokens[None], fwd_hooks=held + hooks, prepend_bos=False)[0, -1]


def _over_layers(model):
    """Whether no layer can be encoded alone."""
    return model.dictionaries.kind == "clt" and model.dictionaries.activation.name == "topk"


def _skip_if_features_cannot_run(model, regime):
    if regime.mlps == "features" and _over_layers(model):
        pytest.skip("TopK over layers has no features of one layer alone, so that they cannot stand in for its MLP")


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@pytest.mark.parametrize("regime", REGIMES)
def test_all_but_a_circuit_ablated(model, task, clean, regime, ablation):
    chosen = REGIMES[regime]
    _skip_if_features_cannot_run(model, chosen)
    circuits = [Kept(()), Kept(INSIDE), Kept(INSIDE[:4], all_but=True)]
    found = Ablated(Cases(model, task), ablation, by="position", regime=chosen).metric(circuits)
    for number, tokens in enumerate(PROMPTS):
        for row, kept in enumerate(circuits):
            logits = _oracle(model, tokens, clean[number], chosen, kept, _fill(clean, ablation, number))
            expected = float(task.examples[number].measure(logits))
            assert found[row, number] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("regime", NAMED)
def test_with_everything_inside_the_run_is_the_models_own(model, task, regime):
    """To the last bit where the model's MLPs run, to rounding where features and errors stand in for them."""
    _skip_if_features_cannot_run(model, REGIMES[regime])
    ablated = Ablated(Cases(model, task), "mean", by="position", regime=regime)
    found = ablated.metric([Kept((), all_but=True)])[0]
    named = [Feature(layer, index) for layer in range(LAYERS) for index in range(FEATURES)]
    whole = ablated.metric([Kept((*named, *(Error(layer) for layer in range(LAYERS))))])[0]
    assert found == pytest.approx(ablated.clean(), rel=1e-10)
    assert whole == pytest.approx(ablated.clean(), rel=1e-10)
    assert ablated.about["regime"] == regime


def test_the_regimes_differ(model, task):
    """What the oracle checks is not the same everywhere."""
    names = [name for name in NAMED if not (REGIMES[name].mlps == "features" and _over_layers(model))]
    found = {name: Ablated(Cases(model, task), "zero", regime=name).metric([Kept(INSIDE)])[0, 0] for name in names}
    assert len({round(float(value), 6) for value in found.values()}) == len(names)
