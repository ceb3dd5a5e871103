"""Training that starts from dictionaries: the same weights at first, what is taken over, what is refused, resuming."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitsae.cli import main
from circuitsae.loading import load_dictionaries
from transcoders import (
    CLTConfig,
    SAEConfig,
    TranscoderConfig,
    TranscoderSet,
    from_checkpoint,
    random_dictionaries,
    random_model,
    save_dictionaries,
    train,
)
from transcoders.errors import DictionaryError, InputError
from transcoders.formats.files import read_json
from transcoders.training import Trainer
from transcoders.training.batches import ModelSource
from transcoders.training.distributed import World
from transcoders.training.export import Scales, export
from transcoders.training.split import Split
from transcoders.training.warm_start import Start

LAYERS, D, FEATURES, BATCH = 3, 8, 12, 32
CONFIGS: Any = {"plt": TranscoderConfig, "clt": CLTConfig, "sae": SAEConfig}
QUIET: Any = {"tokens": BATCH * 6, "batch": BATCH, "context": 9, "outliers": 0.0, "log_every": 6}


def made(kind: Any = "plt", activation: Any = "topk", **options: Any) -> Any:
    settings: Any = {
        "n_layers": LAYERS,
        "d_model": D,
        "features": FEATURES,
        "k": 3,
        "activation": activation,
        **options,
    }
    return random_dictionaries(kind, **settings).requires_grad_(False)


def scales(kind="plt"):
    read, write = (0.5 + torch.rand(2, LAYERS, generator=torch.Generator().manual_seed(1))).double()
    return Scales(read, read if kind == "sae" else write)


def assert_same(found, expected):
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-14, atol=1e-14, msg=name)


@pytest.fixture(scope="module")
def model():
    return random_model(n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=30, context=16, seed=1)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 30, (60, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("kind", ["plt", "clt", "sae"])
def test_what_is_exported_at_once_is_what_was_given(kind, activation, skip):
    options: Any = {"centred": skip} if kind == "sae" else {"skip": skip}
    given = made(kind, activation, dtype="float64", **options)
    start = Start.of(given)
    config = start.config(CONFIGS[kind]())
    weights = start.weights(config, scales(kind), dtype=torch.float64)
    found: Any = export(weights, kind, scales(kind), given.reads, given.writes, given.provenance)
    assert_same(found, given)
    x = torch.randn(LAYERS, 20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normed = x * scales(kind).read[:, None, None]
    written = weights.reconstruct(weights.activate(weights.pre_activations(normed)), normed)
    torch.testing.assert_close(written / scales(kind).write[:, None, None], given.reconstruct(given.encode(x), x))


def test_a_skip_term_of_a_rank_is_two_factors_and_none_has_somewhere_to_grow():
    low = made(skip=True, dtype="float64")
    for layer, d in enumerate(low.layers):
        d.W_skip.copy_(layer * torch.outer(d.W_skip[0], d.W_skip[:, 0]))  # that of layer 0 is zero
    start = Start.of(low)
    config = start.config(TranscoderConfig(skip=True, skip_rank=2))
    weights = start.weights(config, scales(), dtype=torch.float64)
    assert weights.W_skip is not None
    assert weights.W_skip_out is not None
    assert weights.W_skip.shape == (LAYERS, D, 2)
    assert bool(weights.W_skip.norm(dim=1).gt(0.1).all())  # so that the second factor has a gradient
    assert_same(export(weights, "plt", scales(), low.reads, low.writes, low.provenance), low)
    with pytest.raises(InputError, match="a rank above skip_rank=2"):
        Start.of(made(skip=True)).weights(config, scales())


@pytest.mark.parametrize("by", ["features", "layers"])
def test_ranks_have_their_share_of_the_weights(by):
    start = Start.of(made("plt", "jumprelu", skip=True, features=FEATURES, n_layers=LAYERS))
    config = start.config(TranscoderConfig(parallel=by))
    whole = start.weights(config, scales()).state_dict()
    for rank in range(2):
        split = Split(World(rank, 2), by)
        own = split.layers_of(LAYERS)
        of_layers = slice(own.start, own.stop)
        s = Scales(*(side[of_layers] for side in (scales().read, scales().write)))
        for name, tensor in start.weights(config, s, split=split).state_dict().items():
            piece = split.piece(name, LAYERS, FEATURES)
            torch.testing.assert_close(tensor, piece.cut("whole", whole[piece.name]))


def test_training_starts_from_them_and_says_so(model, text, tmp_path):
    given = made("clt", "topk", skip=True)
    still = CLTConfig(**QUIET | {"tokens": BATCH}, lr=1e-12)
    save_dictionaries(given, tmp_path / "given")
    found: Any = train(model, text, still, start=tmp_path / "given", out=tmp_path / "run", progress=False)
    for name, weight in given.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, msg=name)
    settings = found.provenance.config
    assert settings["start"] == dict(Start.of(given).record())
    assert (settings["features"], settings["activation"], settings["k"], settings["skip"]) == (12, "topk", 3, True)
    assert read_json(tmp_path / "run" / "run.json")["run"]["start"] == Start.of(given).hash
    assert Start.of(made("clt", "topk", skip=True, seed=1)).hash != Start.of(given).hash


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_run_that_was_cut_goes_on_to_the_very_weights(model, text, tmp_path, activation):
    given = made("plt", activation)
    asked = TranscoderConfig(**QUIET, skip=True, checkpoint_every=3)
    whole: Any = train(model, text, asked, start=given, progress=False)
    start = Start.of(given)
    config = start.config(asked)
    trainer = Trainer(ModelSource(model, text, config), [config], out=tmp_path, start=start)
    trainer.run(until=3, progress=False)
    assert from_checkpoint(tmp_path).provenance.config["start"]["weights"] == start.hash
    for other in (None, made("plt", activation, seed=5)):
        with pytest.raises(InputError, match="belongs to another run"):
            train(model, text, config, out=tmp_path, resume=True, start=other, progress=False)
    resumed: Any = train(model, text, asked, out=tmp_path, resume=True, start=given, progress=False)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    again: Any = train(model, text, asked, out=tmp_path, resume=True, start=given, progress=False)
    assert torch.equal(again[0].W_skip, whole[0].W_skip)
    assert bool(whole[0].W_skip.any())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"features": 40}, "have features=12; got features=40"),
        ({"activation": "relu"}, "have activation='topk'; got activation='relu'"),
        ({"activation": "topk", "k": 5}, "have k=3; got k=5"),
        ({"decoders": "unit"}, "have decoders='free'; got decoders='unit'"),
        ({"first": 2}, "have first=1; got first=2"),
        ({"aligned": True}, "aligned=True changes encoders"),
    ],
)
def test_settings_that_contradict_the_start_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        Start.of(made()).config(TranscoderConfig(**settings))


def test_the_command_takes_a_name_and_what_the_dictionaries_are(tmp_path, monkeypatch):
    told: dict[str, Any] = {}
    monkeypatch.setattr("transcoders.train", lambda *of, **how: told.update(how, config=of[2]) or sys.exit("seen"))
    with pytest.raises(SystemExit, match="seen"):
        main(["train", "pocket", "--kind", "plt", "--start", "pocket-plt", "--out", str(tmp_path / "run")])
    given: Any = load_dictionaries("pocket-plt")
    assert Start.of(told["start"]).hash == Start.of(given).hash
    assert told["config"].features == given.n_features(0)
    assert told["config"].activation == given[0].activation.name


def test_what_fits_no_training_is_refused(model, text):
    mixed = TranscoderSet([*made(features=12).layers[:2], made(features=10)[2]], made().provenance)
    two = TranscoderSet([*made(k=3).layers[:2], made(k=2)[2]], made().provenance)
    below = made("plt", "jumprelu")
    below[1].activation.threshold[0] = -1.0
    for given, says in (
        (made("plt", "groupmax"), "'groupmax' cannot be trained"),
        (made("clt", "jumptopk"), "'jumptopk' cannot be trained"),
        (made().only([0, 2]), "a layer is absent"),
        (mixed, r"different numbers of features \(10, 12\)"),
        (two, "different k"),
        (below, "a threshold is below zero"),
        (made("sae", "relu", skip=True), "with a skip term cannot be trained"),
    ):
        with pytest.raises(DictionaryError, match=says):
            Start.of(given)
    by_layer = made("clt", "topk")
    by_layer.activation.over_layers = False
    with pytest.raises(DictionaryError, match="ranks each layer by itself"):
        Start.of(by_layer)
    config = TranscoderConfig(**QUIET)
    cases: Any = (
        (made("clt"), config, "of kind 'clt'; got kind 'plt'"),
        (made("plt", read="resid_mid"), config, "read 0.resid_mid … 2.resid_mid"),
        (made("plt", d_model=16), config, "of width 16"),
        (made("plt"), [config, replace(config, seed=1)], "there are 2 configurations"),
    )
    for given, other, says in cases:
        with pytest.raises(InputError, match=says):
            train(model, text, other, start=given, progress=False)
