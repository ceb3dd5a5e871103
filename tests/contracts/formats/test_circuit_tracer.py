"""circuit-tracer's layouts, written here from their published definition, against a dense oracle in float64."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from circuitsae.attribution import attribute
from circuitsae.replacement import ReplacementModel
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, MappedDictionaries, TopK, Transcoder, TranscoderSet
from transcoders.errors import CircuitsaeError, DictionaryError, FileFormatError, InputError
from transcoders.formats.registry import list_dictionaries
from transcoders.loading import random_model

LAYERS, D, N, TOKENS = 3, 8, 12, 5
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "dictionaries" / "circuit_tracer"
OWN, ALICE, BOB = "carol/set", "alice/first", "bob/second"


@dataclass
class Layout:
    """A set on disk, in one repository or several, with what it computes by definition."""

    settings: dict[str, Any]
    """Empty where there is no config.yaml."""
    files: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of the set's own folder."""
    others: dict[tuple[str, str], dict[str, dict[str, torch.Tensor]]] = field(default_factory=dict)
    """Of other repositories, by name and revision."""
    truth: Callable[[torch.Tensor], tuple[list[torch.Tensor], torch.Tensor]] = lambda x: ([x], x)
    """Features and reconstruction `[layer, token, …]` of reads."""
    decoders_stay: bool = True


def write(folder, settings, files):
    folder.mkdir(parents=True, exist_ok=True)
    if settings:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for name, tensors in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
        else:
            save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is not asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(cache, repository, settings, files, revision="main", folder=""):
    place = cache / f"models--{repository.replace('/', '--')}"
    commit = f"{abs(hash((repository, revision))):040x}"[:40]
    (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    write(place / "snapshots" / commit / folder, settings, files)


def settings(kind="transcoder_set", reads="mlp.hook_in", writes="mlp.hook_out", **more):
    return {
        "model_name": "someone/gpt2-like", "model_kind": kind, "feature_input_hook": reads,
        "feature_output_hook": writes, **more,
    }  # fmt: skip


# weights, and what they compute


def draw(name, *shape, scale=0.5):
    seed = sum(letter * 31**place for place, letter in enumerate(name.encode())) % 2**31
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer_weights(layer, n=N):
    """One transcoder, all of its terms; encoders as `[feature, d]`, W_skip applied as `x W_skipᵀ`."""
    shapes = {"W_enc": (n, D), "b_enc": (n,), "W_dec": (n, D), "b_dec": (D,), "W_skip": (D, D)}
    made = {name: draw(f"{name}{layer}", *shape) for name, shape in shapes.items()}
    return made | {"threshold": draw(f"threshold{layer}", n).abs()}


def active(h, sigma, theta=None, k=None):
    if sigma == "jumprelu":
        return h * (h > theta)
    if sigma == "topk":
        kept = torch.zeros_like(h).scatter(-1, h.topk(k, dim=-1).indices, 1.0)
        return h.clamp(min=0) * kept
    return h.clamp(min=0)


def layers_truth(weights, sigma, *, skip=False, k=None):
    def truth(x):
        encoded, decoded = [], []
        for read, w in zip(x, ({n: t.double() for n, t in w.items()} for w in weights), strict=True):
            a = active(read @ w["W_enc"].T + w["b_enc"], sigma, w["threshold"], k)
            y = a @ w["W_dec"] + w["b_dec"] + (read @ w["W_skip"].T if skip else 0)
            encoded.append(a)
            decoded.append(y)
        return encoded, torch.stack(decoded)

    return truth


def across_weights(layer):
    made = layer_weights(layer)
    made["W_dec"] = draw(f"across{layer}", N, LAYERS, D)  # to all layers; those before its own are unused
    return made


def across_truth(weights, sigma, *, skip=False):
    """Skip terms of a cross-layer transcoder are `x W_skip`, as given."""

    def truth(x):
        ws = [{n: t.double() for n, t in w.items()} for w in weights]
        a = [active(read @ w["W_enc"].T + w["b_enc"], sigma, w["threshold"]) for read, w in zip(x, ws, strict=True)]
        decoded = [
            ws[target]["b_dec"]
            + torch.stack([a[layer] @ ws[layer]["W_dec"][:, target] for layer in range(target + 1)]).sum(0)
            + (x[target] @ ws[target]["W_skip"] if skip else 0)
            for target in range(LAYERS)
        ]
        return a, torch.stack(decoded)

    return truth


# the layouts


def own_file(weights, sigma="relu", *, skip=False, **more):
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["W_skip"] * skip
    jump = {"activation_function.threshold": weights["threshold"]} if sigma == "jumprelu" else {}
    return {name: weights[name] for name in names} | jump | more


def in_order(sigma="relu", *, skip=False, k=None, stated=None, **more):
    weights = [layer_weights(layer) for layer in range(LAYERS)]
    files = {f"layer_{i}.safetensors": own_file(w, sigma, skip=skip, **more) for i, w in enumerate(weights)}
    return Layout(settings(**(stated or {})), files, truth=layers_truth(weights, sigma, skip=skip, k=k))


def one_threshold_for_all():
    weights = [{**layer_weights(layer), "threshold": torch.tensor([0.25 + layer])} for layer in range(LAYERS)]
    files = {f"layer_{i}.safetensors": own_file(w) | {"threshold": w["threshold"]} for i, w in enumerate(weights)}
    return Layout(settings(), files, truth=layers_truth(weights, "jumprelu"))


def listed(how):
    """Files of this folder and of two other repositories, one of them at a revision of its own."""
    weights = [layer_weights(layer) for layer in range(LAYERS)]
    entries = [
        "deep/zero.safetensors",
        f"hf://{ALICE}/deep/one.safetensors",
        f"hf://{BOB}/two.safetensors?revision=refs%2Fpr%2F4",
    ]
    files = [own_file(w, "jumprelu", skip=True) for w in weights]
    return Layout(
        settings(reads="ln2.hook_normalized", writes="hook_mlp_out", transcoders=how(entries)),
        {"deep/zero.safetensors": files[0], "layer_1.safetensors": own_file(layer_weights(77))},
        {
            (ALICE, "main"): {"deep/one.safetensors": files[1], "deep/two.safetensors": files[0]},
            (BOB, "refs/pr/4"): {"two.safetensors": files[2]},
        },
        layers_truth(weights, "jumprelu", skip=True),
    )


def gemma_scope():
    weights = [layer_weights(layer) for layer in range(LAYERS)]
    names = [f"layer_{i}/width_16k/average_l0_{70 + i}/params.npz" for i in range(LAYERS)]
    entries = [f"hf://google/gemma-scope-2b-pt-transcoders/{name}" for name in names]
    files = {
        name: {**own_file(w), "W_enc": w["W_enc"].T, "threshold": w["threshold"]}
        for name, w in zip(names, weights, strict=True)
    }
    return Layout(
        settings(reads="ln2.hook_normalized", writes="hook_mlp_out", transcoders=entries),
        others={("google/gemma-scope-2b-pt-transcoders", "main"): files},
        truth=layers_truth(weights, "jumprelu"),
        decoders_stay=False,
    )


def second_scope(weights, across, skip):
    affine = {"affine_skip_connection": weights["W_skip"] if across else weights["W_skip"].T} if skip else {}
    return {
        "w_enc": weights["W_enc"].T, "w_dec": weights["W_dec"], "b_enc": weights["b_enc"], "b_dec": weights["b_dec"],
        "threshold": weights["threshold"], **affine,
    }  # fmt: skip


def gemma_scope_2(*, across, skip):
    weights = [(across_weights if across else layer_weights)(layer) for layer in range(LAYERS)]
    kind = "cross_layer_transcoder" if across else "transcoder_set"
    names = [f"some/width_16k_l0_big/params_layer_{i}.safetensors" for i in range(LAYERS)]
    entries = [f"hf://google/gemma-scope-2-270m-pt/{name}" for name in names]
    files = {name: second_scope(w, across, skip) for name, w in zip(names, weights, strict=True)}
    truth = (across_truth if across else layers_truth)(weights, "jumprelu", skip=skip)
    return Layout(
        settings(kind, writes="hook_mlp_out", transcoders=entries),
        others={("google/gemma-scope-2-270m-pt", "main"): files},
        truth=truth,
    )


def across(sigma="relu", *, skip=False, stated=None, settled=True):
    weights = [across_weights(layer) for layer in range(LAYERS)]
    files = {}
    for i, w in enumerate(weights):
        names = ["W_enc", "b_enc", "b_dec"] + ["threshold"] * (sigma == "jumprelu") + ["W_skip"] * skip
        files[f"W_enc_{i}.safetensors"] = {f"{name}_{i}": w[name] for name in names}
        files[f"W_dec_{i}.safetensors"] = {f"W_dec_{i}": w["W_dec"][:, i:]}
    config = settings("cross_layer_transcoder", "hook_resid_mid", "hook_mlp_out", **(stated or {}))
    return Layout(config if settled else {}, files, truth=across_truth(weights, sigma, skip=skip))


LAYOUTS = {
    "relu": in_order,
    "relu-said": lambda: in_order(stated={"activation": "relu"}),
    "jumprelu": lambda: in_order("jumprelu"),
    "jumprelu-one-threshold": one_threshold_for_all,
    "topk-said": lambda: in_order("topk", k=4, stated={"activation": "topk", "k": 4}),
    "topk-in-files": lambda: topk_in_files(),
    "skip": lambda: in_order(skip=True),
    "jumprelu-skip": lambda: in_order("jumprelu", skip=True),
    "list": lambda: listed(list),
    "map": lambda: listed(lambda entries: dict(enumerate(entries))),
    "map-of-texts": lambda: listed(lambda entries: {str(i): entry for i, entry in enumerate(entries)}),
    "list-of-maps": lambda: listed(
        lambda entries: [{"id": "x", "layer": i, "filepath": entry} for i, entry in enumerate(entries)][::-1]
    ),
    "gemma-scope": gemma_scope,
    "gemma-scope-2": lambda: gemma_scope_2(across=False, skip=False),
    "gemma-scope-2-affine": lambda: gemma_scope_2(across=False, skip=True),
    "gemma-scope-2-across": lambda: gemma_scope_2(across=True, skip=False),
    "gemma-scope-2-across-affine": lambda: gemma_scope_2(across=True, skip=True),
    "across": across,
    "across-relu-said": lambda: across(stated={"activation": "relu"}),
    "across-jumprelu": lambda: across("jumprelu"),
    "across-skip": lambda: across("jumprelu", skip=True),
    "across-without-settings": lambda: across("jumprelu", settled=False),
}


def topk_in_files():
    layout = in_order("topk", k=3)
    for tensors in layout.files.values():
        tensors["k"] = torch.tensor(3)
    return layout


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]()


def reads():
    return draw("reads", LAYERS, TOKENS, D, scale=2.0).double()


def assert_computes(loaded, truth):
    x = reads()
    encoded, decoded = truth(x)
    features = loaded.encode(x)
    for layer, expected in enumerate(encoded):
        dense = torch.zeros_like(expected)
        here = features.of_layer(layer)
        dense[here.index[:, 1], here.index[:, 2]] = here.value
        torch.testing.assert_close(dense, expected, atol=1e-12, rtol=1e-12)
        assert (expected != 0).any()
        assert (expected == 0).any()
    torch.testing.assert_close(loaded.reconstruct(features, x), decoded, atol=1e-12, rtol=1e-12)


# reading


def test_a_local_folder_computes_what_its_definition_says(layout, tmp_path, cache):
    write(tmp_path / "set", layout.settings, layout.files)
    for (repository, revision), files in layout.others.items():
        publish(cache, repository, {}, files, revision)
    loaded = load_dictionaries(tmp_path / "set", dtype=torch.float64)
    assert_computes(loaded, layout.truth)
    said = layout.settings or settings(reads="hook_resid_mid", writes="hook_mlp_out")
    kinds = {"mlp.hook_in": "mlp_in", "ln2.hook_normalized": "mlp_normed", "hook_resid_mid": "resid_mid"}
    kinds |= {"mlp.hook_out": "mlp_out", "hook_mlp_out": "mlp_added"}
    assert [site.kind for site in loaded.reads] == [kinds[said["feature_input_hook"]]] * LAYERS
    assert [site.kind for site in loaded.writes] == [kinds[said["feature_output_hook"]]] * LAYERS
    assert [site.layer for site in loaded.reads] == list(range(LAYERS))
    if layout.settings:
        assert loaded.provenance.model == "someone/gpt2-like"
        json.dumps(loaded.provenance.to_json())


def test_a_repository_does_so_too(layout, cache):
    publish(cache, OWN, layout.settings, layout.files)
    for (repository, revision), files in layout.others.items():
        publish(cache, repository, {}, files, revision)
    assert_computes(load_dictionaries(OWN, dtype=torch.float64), layout.truth)


@pytest.mark.parametrize(
    ("where", "revision"),
    [
        (f"{OWN}@main", "main"),
        (f"hf://{OWN}", "main"),
        (f"{OWN}@v1", "v1"),
        (f"hf://{OWN}?revision=v1", "v1"),
        (f"hf://{OWN}?revision=refs%2Fpr%2F3&download=true", "refs/pr/3"),
        (f"{OWN}@refs/pr/3", "refs/pr/3"),
    ],
)
def test_a_repository_goes_by_several_names(cache, where, revision):
    layout = in_order()
    publish(cache, OWN, layout.settings, layout.files, revision)
    assert_computes(load_dictionaries(where, dtype=torch.float64), layout.truth)


def test_decoders_stay_in_their_files(layout, tmp_path, cache):
    write(tmp_path / "set", layout.settings, layout.files)
    for (repository, revision), files in layout.others.items():
        publish(cache, repository, {}, files, revision)
    if not layout.decoders_stay:
        with pytest.raises(InputError, match=r"params\.npz cannot stay in an npz file"):
            load_dictionaries(tmp_path / "set", decoders="mapped")
        return
    mapped = load_dictionaries(tmp_path / "set", decoders="mapped", dtype=torch.float64)
    assert isinstance(mapped, MappedDictionaries)
    assert_computes(mapped, layout.truth)


def test_only_what_is_listed_is_fetched(cache, monkeypatch):
    """One request for each repository, for the files that are asked for."""
    from transcoders.formats import source

    layout = listed(list)
    publish(cache, OWN, layout.settings, layout.files)
    for (repository, revision), files in layout.others.items():
        publish(cache, repository, {}, files, revision)
    asked = []
    fetch = source.HubFolder.fetch
    monkeypatch.setattr(
        source.HubFolder, "fetch", lambda self, names: fetch(self, asked.append((self.label, n := list(names))) or n)
    )
    loaded = load_dictionaries(OWN, layers=[0, 2])
    names = [name for _, names in asked for name in names]
    assert [label for label, _ in asked if not label.startswith(OWN)] == [f"{BOB}@refs/pr/4"]
    assert sorted(set(names)) == ["config.yaml", "deep/zero.safetensors", "two.safetensors"]
    assert isinstance(loaded, TranscoderSet)
    assert [layer.is_absent for layer in loaded.layers] == [False, True, False]


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    weights = [layer_weights(layer) for layer in range(12)]
    write(tmp_path, settings(), {f"layer_{i}.safetensors": own_file(w) for i, w in enumerate(weights)})
    loaded = load_dictionaries(tmp_path)
    assert loaded.n_layers == 12
    for layer, w in enumerate(weights):
        assert torch.equal(loaded.decoder_bias(layer), w["b_dec"])


def test_layers_without_a_file_are_absent(tmp_path):
    files = {f"layer_{i}.safetensors": own_file(layer_weights(i, n=4 + i)) for i in (1, 3)}
    write(tmp_path, settings(), files)
    loaded = load_dictionaries(tmp_path)
    assert [loaded.n_features(layer) for layer in range(4)] == [0, 5, 0, 7]
    mapped = load_dictionaries(tmp_path, decoders="mapped")
    x = torch.randn(4, 3, D)
    torch.testing.assert_close(mapped.reconstruct(mapped.encode(x), x), loaded.reconstruct(loaded.encode(x), x))


def test_negative_thresholds_let_negative_values_through(tmp_path):
    """As in circuit-tracer: h · 1[h > θ] for any θ."""
    weights = [{**layer_weights(i), "threshold": draw(f"any{i}", N)} for i in range(LAYERS)]
    files = {f"layer_{i}.safetensors": own_file(w, "jumprelu") for i, w in enumerate(weights)}
    write(tmp_path, settings(), files)
    loaded = load_dictionaries(tmp_path, dtype=torch.float64)
    assert_computes(loaded, layers_truth(weights, "jumprelu"))
    assert (loaded.encode(reads()).value < 0).any()


@pytest.mark.parametrize(
    ("model", "more", "first"),
    [
        ("google/gemma-3-270m-it", {}, 4),
        ("google/gemma-3-270m", {}, 1),
        ("google/gemma-2-2b-it", {}, 1),
        ("google/gemma-3-270m-it", {"zero_positions": 1}, 1),
    ],
)
def test_the_first_positions_have_no_features(tmp_path, model, more, first):
    layout = in_order()
    write(tmp_path / "a", {**layout.settings, "model_name": model, **more}, layout.files)
    loaded = load_dictionaries(tmp_path / "a")
    assert loaded.provenance.first == first
    save_dictionaries(loaded, tmp_path / "b", format="circuit-tracer")
    assert load_dictionaries(tmp_path / "b").provenance.first == first


@pytest.mark.parametrize(("more", "bos"), [({}, True), ({"prepend_bos": False}, False), ({"prepend_bos": "no"}, True)])
def test_prompts_begin_with_a_special_token_unless_settings_say_otherwise(tmp_path, more, bos):
    layout = in_order()
    write(tmp_path, {**layout.settings, **more}, layout.files)
    assert load_dictionaries(tmp_path).provenance.bos is bos


def test_without_settings_a_line_says_what_is_assumed(tmp_path, caplog):
    write(tmp_path, {}, across().files)
    with caplog.at_level(logging.WARNING):
        load_dictionaries(tmp_path)
    assert "has no config.yaml: it is taken for a cross-layer transcoder that reads hook_resid_mid" in caplog.text


def test_k_of_a_known_set_that_leaves_it_out(cache):
    """facebook/crv-8b-instruct-transcoders: 128, as circuit-tracer has it in its code."""
    layout = in_order(stated={"activation": "topk"})
    publish(cache, "facebook/crv-8b-instruct-transcoders", layout.settings, layout.files)
    loaded = load_dictionaries("facebook/crv-8b-instruct-transcoders")
    assert isinstance(loaded, TranscoderSet)
    assert [layer.activation.k for layer in loaded.layers if isinstance(layer.activation, TopK)] == [128] * LAYERS


@pytest.mark.parametrize("short", ["gemma", "llama"])
def test_short_names(cache, short):
    names = {"gemma": "mwhanna/gemma-scope-transcoders", "llama": "mntss/transcoder-Llama-3.2-1B"}
    layout = in_order()
    publish(cache, names[short], layout.settings, layout.files)
    assert_computes(load_dictionaries(short, dtype=torch.float64), layout.truth)


# what there is


def test_layers_widths_and_l0s_are_listed_without_weights(cache):
    layout = gemma_scope()
    publish(cache, OWN, layout.settings, {})
    name, offers = list_dictionaries(OWN)
    assert name == "circuit-tracer"
    assert [(o.layer, o.site, o.kind, o.width, o.l0) for o in offers] == [
        (layer, "mlp_normed", "plt", 16384, 70 + layer) for layer in range(LAYERS)
    ]


def several(cache):
    """As mwhanna/gemma-scope-2-270m-pt: sets in folders of their own."""
    layouts = {"transcoder_all/width_16k_l0_big": in_order("jumprelu"), "clt/width_262k_l0_medium": across()}
    layouts["transcoder_all/width_16k_l0_small"] = in_order(skip=True)
    for folder, layout in layouts.items():
        publish(cache, OWN, layout.settings, layout.files, folder=folder)
    return layouts


def test_one_repository_holds_several_sets(cache):
    layouts = several(cache)
    _, offers = list_dictionaries(OWN)
    assert {o.variant for o in offers} == set(layouts)
    assert {(o.kind, o.width) for o in offers} == {("plt", 16384), ("clt", 262144)}
    for folder, layout in layouts.items():
        assert_computes(load_dictionaries(OWN, sae_id=folder, dtype=torch.float64), layout.truth)
        assert_computes(load_dictionaries(f"{OWN}/{folder}", dtype=torch.float64), layout.truth)
        assert_computes(load_dictionaries(OWN, variant=folder, dtype=torch.float64), layout.truth)
    with pytest.raises(InputError, match="more than one (kind|variant)"):
        load_dictionaries(OWN)
    with pytest.raises(InputError, match="width_16k_l0_big, transcoder_all/width_16k_l0_small.*variant="):
        load_dictionaries(OWN, width="16k")


# attribution

HOOKS = [
    ("hook_resid_mid", "hook_mlp_out"),
    ("ln2.hook_normalized", "hook_mlp_out"),
    ("ln2.hook_normalized", "mlp.hook_out"),
    ("mlp.hook_in", "mlp.hook_out"),
    ("mlp.hook_in", "hook_mlp_out"),
]


@pytest.mark.parametrize("hooks", HOOKS, ids="-".join)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize(
    "make", [lambda: in_order("jumprelu", skip=True), lambda: across("jumprelu")], ids=["plt", "clt"]
)
def test_graphs_are_conserved(tmp_path, make, family, hooks):
    layout = make()
    config = {**layout.settings, "feature_input_hook": hooks[0], "feature_output_hook": hooks[1]}
    write(tmp_path, config, layout.files)
    model = random_model(family, n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=40, dtype=torch.float64)
    graph = attribute(
        ReplacementModel(model, load_dictionaries(tmp_path, dtype=torch.float64)), torch.tensor([0, 5, 9, 2, 7])
    )
    assert any(node.kind == "feature" for node in graph.nodes)
    assert abs(graph.residual()).max() < 1e-9


def test_the_adjacency_of_a_clt_before_the_norm_is_that_of_a_frozen_gpt2_written_out(tmp_path):
    """mathematics.md, term by term: A[t, s] = a_s Σ W_dec[s→l'] · P · W_enc[:, t], with P by automatic derivatives."""
    layout = across("jumprelu")
    write(tmp_path, layout.settings, layout.files)
    model = random_model("gpt2", n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=40, dtype=torch.float64)
    tokens = torch.tensor([0, 5, 9, 2, 7])
    loaded = load_dictionaries(tmp_path, dtype=torch.float64)
    graph = attribute(ReplacementModel(model, loaded), tokens)
    found = _adjacency(model.bridge.original_model, tokens, layout)
    dense = graph.weights.toarray()
    position = graph.position
    assert len(found) > 500
    differences = [abs(dense[position[t], position[s]] - weight) for (t, s), weight in found.items()]
    assert max(differences) < 1e-10
    features = {node.id for node in graph.nodes if node.kind == "feature"}
    assert features == {target for target, _ in found}


@torch.no_grad()
def _adjacency(gpt2, tokens, layout):
    """Edges from features, errors and tokens to features, by target and source."""
    core, T = gpt2.transformer, len(tokens)

    def run(embed, outs, frozen=None):
        """What is read at `hook_resid_mid`, given what is written; patterns and scales as recorded in `frozen`."""
        stream, middles, record = embed, [], []
        for i, block in enumerate(core.h):
            x, scale = _norm(stream, block.ln_1, frozen and frozen[i][0])
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(0, 1) for t in block.attn.c_attn(x).chunk(3, -1))
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            pattern = scores.softmax(-1) if frozen is None else frozen[i][1]
            stream = stream + block.attn.c_proj((pattern @ v).transpose(0, 1).flatten(1))
            middles.append(stream)
            record.append((scale, pattern))
            out = block.mlp(_norm(stream, block.ln_2)[0]) if outs is None else outs[i]
            record[-1] += (out,)
            stream = stream + out
        return torch.stack(middles), record

    token = core.wte(tokens)
    middles, record = run(token + core.wpe(torch.arange(T)), None)
    outs = torch.stack([of_block[2] for of_block in record])
    encoded, decoded = layout.truth(middles)
    with torch.enable_grad():
        to_embed, to_outs = torch.func.jacrev(lambda e, o: run(e, o, record)[0], argnums=(0, 1))(
            token + core.wpe(torch.arange(T)), outs
        )
    W = [across_weights(layer) for layer in range(LAYERS)]
    nodes = [
        (layer, int(f), int(p))
        for layer in range(LAYERS)
        for p, f in encoded[layer][1:].nonzero() + torch.tensor([1, 0])
    ]
    edges = {}
    for layer, f, p in nodes:
        target = f"{layer}.{f}@{p}"
        by_out = torch.einsum("d,dlqe->lqe", W[layer]["W_enc"][f].double(), to_outs[layer, p])
        by_embed = torch.einsum("d,dqe->qe", W[layer]["W_enc"][f].double(), to_embed[layer, p])
        for source, g, q in nodes:
            if source < layer and q <= p:
                rows = W[source]["W_dec"][g, source:].double()
                edges[target, f"{source}.{g}@{q}"] = float(encoded[source][q, g] * (by_out[source:, q] * rows).sum())
        for source in range(layer):
            for q in range(1, p + 1):
                error = outs[source, q] - decoded[source, q]
                edges[target, f"{source}.err@{q}"] = float(by_out[source, q] @ error)
        for q in range(p + 1):
            edges[target, f"tok@{q}"] = float(by_embed[q] @ token[q])
    return edges


def _norm(x, norm, scale=None):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() if scale is None else scale
    return centred / scale * norm.weight + norm.bias, scale


# writing


@pytest.mark.parametrize(
    "case",
    [
        *({"kind": kind, "activation": sigma} for kind in ("plt", "clt") for sigma in ("relu", "jumprelu")),
        {"kind": "plt", "activation": "topk", "skip": True},
        {"kind": "plt", "read": "mlp_normed", "write": "mlp_added"},
        {"kind": "clt", "read": "resid_mid", "write": "mlp_added"},
    ],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_what_is_written_is_read_again(tmp_path, case):
    original = random_dictionaries(**case, n_layers=3, d_model=D, features=N, k=4).requires_grad_(False)
    save_dictionaries(original, tmp_path, format="circuit-tracer")
    loaded = load_dictionaries(tmp_path)
    x = reads().float()
    assert (type(loaded), loaded.reads, loaded.writes) == (type(original), original.reads, original.writes)
    found, expected = loaded.encode(x), original.encode(x)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(loaded.reconstruct(found, x), original.reconstruct(expected, x))


def test_written_files_are_those_of_the_layout(tmp_path):
    original = random_dictionaries("plt", n_layers=2, d_model=D, features=N, activation="jumprelu", skip=True)
    save_dictionaries(original, tmp_path, format="circuit-tracer")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert "transcoders" not in config  # circuit-tracer takes entries without hf:// for paths from where it runs
    tensors = load_file(tmp_path / "layer_1.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (N, D), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "W_skip": (D, D),
        "activation_function.threshold": (N,),
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(tensors["W_enc"], original[1].W_enc.T)
        assert original[1].W_skip is not None
        assert torch.equal(tensors["W_skip"], original[1].W_skip.T)


def test_files_of_an_earlier_set_do_not_stay(tmp_path):
    kinds: list[tuple[int, Any]] = [(4, "plt"), (2, "plt"), (3, "clt"), (2, "clt"), (2, "plt")]
    for n_layers, kind in kinds:
        save_dictionaries(
            random_dictionaries(kind, n_layers=n_layers, d_model=D, features=N), tmp_path, format="circuit-tracer"
        )
        loaded = load_dictionaries(tmp_path)
        assert (loaded.kind, loaded.n_layers) == (kind, n_layers)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_topk_says_that_the_present_release_takes_it_for_relu(tmp_path, caplog):
    made = random_dictionaries("plt", d_model=D, features=N, k=4, activation="topk")
    with caplog.at_level(logging.WARNING):
        save_dictionaries(made, tmp_path, format="circuit-tracer")
    assert "circuit-tracer 0.5.0 takes TopK transcoders for ReLU ones" in caplog.text
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["activation"], config["k"]) == ("topk", 4)
    assert "k" not in load_file(tmp_path / "layer_0.safetensors")  # its loader refuses tensors it does not know


def test_absent_layers_get_no_file(tmp_path, caplog):
    present = random_dictionaries("plt", n_layers=3, d_model=D, features=N)
    made = TranscoderSet([present[0], Transcoder.absent(1, D), present[2]], present.provenance)
    with caplog.at_level(logging.WARNING):
        save_dictionaries(made, tmp_path, format="circuit-tracer")
    assert "Layers 1 have no transcoder" in caplog.text
    loaded = load_dictionaries(tmp_path)
    assert [loaded.n_features(layer) for layer in range(3)] == [N, 0, N]


def test_skip_terms_of_some_layers_are_zeros_in_the_others(tmp_path):
    with_skip, without = (
        random_dictionaries("plt", n_layers=2, d_model=D, features=N, skip=skip).requires_grad_(False)
        for skip in (True, False)
    )
    made = TranscoderSet([without[0], with_skip[1]], without.provenance)
    save_dictionaries(made, tmp_path, format="circuit-tracer")
    assert not load_file(tmp_path / "layer_0.safetensors")["W_skip"].any()
    x = reads()[:2].float()
    loaded = load_dictionaries(tmp_path)
    assert torch.equal(loaded.reconstruct(loaded.encode(x), x), made.reconstruct(made.encode(x), x))


def _unequal():
    a, b = (random_dictionaries("plt", n_layers=2, d_model=D, features=n) for n in (N, N + 1))
    return TranscoderSet([a[0], b[1]], a.provenance)


def _two_ks():
    a, b = (random_dictionaries("plt", n_layers=2, d_model=D, features=N, activation="topk", k=k) for k in (3, 4))
    return TranscoderSet([a[0], b[1]], a.provenance)


def _normed():
    from transcoders.dictionaries.token_norm import TokenNorm

    made = random_dictionaries("plt", d_model=D, features=N)
    made[1].norm = TokenNorm("layer_norm")
    return made


CANNOT = {
    "unequal widths": (_unequal, "layers of 12, 13 features"),
    "several k": (_two_ks, "k = 3, k = 4"),
    "norms of a token": (_normed, "layer_norm"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, case):
    build, message = CANNOT[case]
    with pytest.raises(DictionaryError, match=message) as raised:
        save_dictionaries(build().requires_grad_(False), tmp_path / "out", format="circuit-tracer")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


# what is wrong


def config(**change):
    def spoil(layout):
        layout.settings = {k: v for k, v in {**layout.settings, **change}.items() if v is not ...}

    return spoil


def without(name):
    return lambda layout: layout.files.pop(name)


def tensors(name, change):
    return lambda layout: layout.files[name].update(change(layout.files[name]))


def lacking(name, key):
    return lambda layout: layout.files[name].pop(key)


def first_of_others(key, change):
    """Change one tensor of the first file of another repository; it goes where nothing is given."""

    def spoil(layout):
        (files,) = layout.others.values()
        tensors_of_first = next(iter(files.values()))
        if change is None:
            tensors_of_first.pop(key)
        else:
            tensors_of_first[key] = change(tensors_of_first[key])

    return spoil


def listing(change):
    """Another list of files than the layout's own."""
    return lambda layout: layout.settings.update(transcoders=change(layout.settings["transcoders"]))


def too_far(layout):
    layout.files["layer_99999.safetensors"] = layout.files[FIRST]


def wider(layout):
    grown = {
        name: [D + 1 if size == D else size for size in tensor.shape] for name, tensor in layout.files[FIRST].items()
    }
    layout.files[FIRST] = {name: torch.zeros(shape) for name, shape in grown.items()}


FIRST, ENC, DEC = "layer_0.safetensors", "W_enc_1.safetensors", "W_dec_1.safetensors"


def scope_2(across=False):
    return lambda: gemma_scope_2(across=across, skip=True)


WRONG = {
    "no kind of model": (in_order, config(model_kind="transformer"), "'transformer'"),
    "no hook": (in_order, config(feature_input_hook=...), "feature_input_hook"),
    "another hook": (in_order, config(feature_output_hook="attn.hook_q"), "feature_output_hook 'attn.hook_q'"),
    "no number of positions": (in_order, config(zero_positions=-1), "zero_positions"),
    "an activation": (in_order, config(activation="gated"), "'gated'"),
    "k of none": (in_order, config(activation="topk"), "without its k"),
    "k of zero": (in_order, config(activation="topk", k=0), "k: 0"),
    "k in a file": (in_order, tensors(FIRST, lambda t: {"k": torch.tensor([3, 4])}), r"k = \[3, 4\]"),
    "k of nothing": (in_order, tensors(FIRST, lambda t: {"k": torch.tensor(torch.nan)}), "k that is not a finite"),
    "jumprelu of none": (in_order, config(activation="jumprelu"), "lacks the thresholds"),
    "jumprelu of none across": (across, config(activation="jumprelu"), "lacks the thresholds"),
    "nothing listed": (in_order, config(transcoders=[]), "transcoders"),
    "numbers listed": (in_order, config(transcoders=[1, 2]), "lists '1' for layer 0"),
    "a way out": (in_order, config(transcoders=["../secret.safetensors"]), "lists '../secret"),
    "an absolute path": (in_order, config(transcoders=["/etc/passwd"]), "lists '/etc/passwd'"),
    "another protocol": (in_order, config(transcoders=["s3://a/b"]), "lists 's3://a/b'"),
    "no file on the hub": (in_order, config(transcoders=["hf://a/b"]), "names no file"),
    "no name of the hub": (in_order, config(transcoders=["hf://x"]), "no hub name"),
    "a layer twice": (
        in_order,
        config(transcoders=[{"layer": 0, "filepath": FIRST} for _ in range(2)]),
        "layer 0; expected",
    ),
    "a layer too far": (in_order, config(transcoders={10**9: FIRST}), "layer 1000000000"),
    "a file too far": (in_order, too_far, "many layers"),
    "a file that is absent": (in_order, config(transcoders=["other.safetensors"]), "There is no file"),
    "no files": (in_order, lambda layout: layout.files.clear(), "holds no layer_0.safetensors"),
    "no encoder": (in_order, lacking(FIRST, "W_enc"), "lacks W_enc"),
    "another width": (in_order, tensors(FIRST, lambda t: {"b_dec": torch.zeros(D + 1)}), "b_dec"),
    "a layer of another width": (in_order, wider, rf"W_enc \[{N}, {D}\]"),
    "thresholds": (in_order, tensors(FIRST, lambda t: {"threshold": torch.zeros(3)}), r"threshold \[3\]"),
    "whole numbers": (in_order, tensors(FIRST, lambda t: {"W_enc": t["W_enc"].long()}), "in I64"),
    "whole numbers in npz": (gemma_scope, first_of_others("W_enc", torch.Tensor.int), "in torch.int32"),
    "no thresholds in npz": (gemma_scope, first_of_others("threshold", None), "lacks threshold"),
    "no thresholds in Gemma Scope 2": (scope_2(), first_of_others("threshold", None), "lacks threshold"),
    "not finite": (in_order, tensors(FIRST, lambda t: {"b_enc": t["b_enc"] * torch.nan}), "not a finite number"),
    "topk across": (across, config(activation="topk", k=3), "'topk', which circuit-tracer's cross-layer"),
    "no encoder of a layer": (across, without(ENC), "2 files as W_enc_I.safetensors and none for layer 1"),
    "no decoder of a layer": (across, without(DEC), "2 files as W_dec_I.safetensors and none for layer 1"),
    "decoders of fewer layers": (across, tensors(DEC, lambda t: {"W_dec_1": t["W_dec_1"][:, 1:]}), rf"\[{N}, 1, {D}\]"),
    "some thresholds": (lambda: across("jumprelu"), lacking(ENC, "threshold_1"), "thresholds for 2 of 3 layers"),
    "some skip terms": (lambda: across(skip=True), lacking(ENC, "W_skip_1"), "skip terms for 2 of 3 layers"),
    "a gap across": (
        scope_2(across=True),
        listing(lambda entries: dict(zip((0, 1, 3), entries, strict=True))),
        "none for layer 2",
    ),
    "too few across": (scope_2(across=True), listing(lambda entries: entries[:2]), rf"w_dec \[{N}, 3, {D}\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, cache, case):
    build, spoil, message = WRONG[case]
    spoil(layout := build())
    write(tmp_path / "set", layout.settings, layout.files)
    for (repository, revision), files in layout.others.items():
        publish(cache, repository, {}, files, revision)
    with pytest.raises((FileFormatError, InputError), match=message) as raised:
        load_dictionaries(tmp_path / "set")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_repository_that_is_not_here_is_named(cache):
    layout = listed(list)
    publish(cache, OWN, layout.settings, layout.files)
    with pytest.raises(FileFormatError, match="'alice/first' are not on this machine"):
        load_dictionaries(OWN)


@pytest.mark.parametrize("name", ["relu", "list", "gemma-scope-2-across", "across-jumprelu"])
def test_damaged_files_are_refused(tmp_path, cache, name):
    """Bytes changed or cut off anywhere: one sentence, or sound dictionaries."""
    layout = LAYOUTS[name]()
    write(tmp_path / "set", layout.settings, layout.files)
    for (repository, revision), files in layout.others.items():
        publish(cache, repository, {}, files, revision)
    paths = [
        p for place in (tmp_path / "set", cache) for p in place.rglob("*") if p.suffix in (".yaml", ".safetensors")
    ]
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for trial in range(40):
        path = paths[trial % len(paths)]
        sound = path.read_bytes()
        at = int(torch.randint(min(len(sound), 300), (), generator=generator))
        flipped = bytes([sound[at] ^ (1 << trial % 8)])
        path.write_bytes(sound[:at] if trial % 3 == 0 else sound[:at] + flipped + sound[at + 1 :])
        said = None
        try:
            loaded = load_dictionaries(tmp_path / "set")
            loaded.encode(torch.randn(loaded.n_layers, 2, loaded.d_model))
        except CircuitsaeError as error:
            said = str(error)
        path.write_bytes(sound)
        refused += said is not None
        assert "\n" not in (said or "")
    assert refused > 10


# what circuit-tracer itself wrote


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDEN.glob("*")) if GOLDEN.is_dir() else [])
def test_what_the_peer_wrote_computes_what_the_peer_says(tmp_path, cache, case):
    folder = GOLDEN / case
    for other in sorted((folder / "others").glob("*")) if (folder / "others").is_dir() else []:
        repository, _, revision = other.name.partition("@")
        publish(cache, repository.replace("--", "/"), {}, {}, revision)
        commit = (cache / f"models--{repository}" / "refs" / revision).read_text()
        shutil.copytree(other, cache / f"models--{repository}" / "snapshots" / commit, dirs_exist_ok=True)
    truth = {name: t.double() for name, t in load_file(folder / "truth.safetensors").items()}
    for place in ("memory",) if "gemma_scope_plt" in case else ("memory", "mapped"):
        loaded = load_dictionaries(folder / "files", dtype=torch.float64, decoders=place)
        features = loaded.encode(truth["x"])
        dense = torch.zeros_like(truth["encoded"])
        dense[tuple(features.index.T)] = features.value
        torch.testing.assert_close(dense, truth["encoded"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loaded.reconstruct(features, truth["x"]), truth["decoded"], atol=1e-5, rtol=1e-5)
        said = json.loads((folder / "truth.json").read_text())
        assert isinstance(loaded, CrossLayerTranscoder if "clt" in case else TranscoderSet) or place == "mapped"
        assert loaded.n_layers == said["layers"]
