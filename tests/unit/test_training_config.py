"""Configurations and schedules."""

import json
import subprocess
import sys

import pytest

from transcoders import CLTConfig, SAEConfig, TranscoderConfig, config_from_json
from transcoders.errors import InputError
from transcoders.training.sparsity import learning_rate, sparsity_weight


@pytest.mark.parametrize(
    "config", [CLTConfig(features=7, skip=True), TranscoderConfig(betas=(0.8, 0.9)), SAEConfig(site="attn_out")]
)
def test_a_configuration_survives_json(config):
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_configuration_of_the_first_release_is_read_with_the_defaults_of_what_it_does_not_name():
    record = json.loads(
        """{"kind": "clt", "features": 1024, "activation": "jumprelu", "k": 32, "sparsity": 0.005,
        "sparsity_warmup": 0.5, "tanh_scale": 8.0, "bandwidth": 0.3, "threshold": 0.1, "tokens": 3000000, "batch": 512,
        "lr": 0.003, "warmup": 0.05, "decay": 0.3, "betas": [0.9, 0.99], "clip": 1.0, "dead_after": 100000,
        "revival": 0.03125, "k_aux": 64, "context": 96, "separator": "\\n", "buffer_mb": 256, "seed": 0,
        "checkpoint_every": 1000, "log_every": 100, "skip": false}"""
    )
    config = config_from_json(record)
    assert config == CLTConfig(
        features=1024, tokens=3_000_000, lr=3e-3, context=96, separator="\n", buffer_mb=256, dead_after=100_000
    )
    assert (config.penalty_used, config.remedy, config.aligned) == ("tanh", "default", False)
    assert (config.remedy_used, config.dead_after_used) == ("auxiliary", 100_000)


def test_optional_settings_and_lists_survive_json():
    config = SAEConfig(activation="batchtopk", matryoshka=(0.25, 1.0), start_l0=3.0, ema=0.9)
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config
    config = CLTConfig(remedy="ghost", k_aux=0, aux_pooling="token", matryoshka_loss="sum")
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config_from_json({"kind": "sae", "target_l0": None}).target_l0 is None
    assert config_from_json({"kind": "sae", "target_l0": 16}).target_l0 == 16.0
    with pytest.raises(InputError, match="target_l0 must be of type float; got 'low'"):
        config_from_json({"kind": "sae", "target_l0": "low"})
    with pytest.raises(InputError, match="matryoshka must be a list"):
        config_from_json({"kind": "sae", "matryoshka": 0.5})


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(InputError, match="no setting 'feature'; did you mean 'features'"):
        config_from_json({"kind": "clt", "feature": 3})
    with pytest.raises(InputError, match="'zzz'; the settings are features, "):
        config_from_json({"kind": "clt", "zzz": 3})
    with pytest.raises(InputError, match="Unknown kind of dictionary 'lorsa'; there are 'sae', 'plt', 'clt'"):
        config_from_json({"kind": "lorsa"})
    with pytest.raises(InputError, match=r"Unknown kind of dictionary \['clt'\]"):
        config_from_json({"kind": ["clt"]})
    with pytest.raises(InputError, match="kind 'clt' has no setting 'site'; kind 'sae' has it"):
        config_from_json({"kind": "clt", "site": "mlp_in"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"features": 0}, "features must be at least 1; got 0"),
        ({"warmup": 1.5}, "warmup is a fraction"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"bandwidth": 0.0}, "bandwidth must be positive"),
        ({"site": "attn"}, "site cannot be 'attn'"),
        ({"remedy": "ghosts"}, "remedy cannot be 'ghosts'; there are .*'ghost'"),
        ({"k_aux": -1}, "k_aux must be at least 0; got -1"),
        ({"features": "many"}, "features must be of type int; got 'many'"),
    ],
)
def test_an_impossible_setting_is_refused(setting, message):
    with pytest.raises(InputError, match=message):
        config_from_json({"kind": "sae", **setting})


def test_what_is_not_chosen_follows_from_the_number_of_features_and_of_tokens():
    rates = [SAEConfig(features=n).lr_used for n in (64, 512, 2048, 32768)]
    assert rates == pytest.approx([8e-3, 8e-3, 8e-3 / 4**0.7, 8e-3 / 64**0.7])
    assert SAEConfig(lr=1e-3).lr_used == 1e-3
    short, long = (SAEConfig(activation="topk", batch=1024, tokens=1024 * steps) for steps in (500, 12_000))
    others = TranscoderConfig(activation="topk"), CLTConfig(activation="topk"), SAEConfig(), SAEConfig(remedy="none")
    assert [c.remedy_used for c in (short, *others)] == ["resample", "resample", "auxiliary", "auxiliary", "none"]
    assert [c.dead_after_used for c in (short, long)] == [5120, 122_880]
    assert [c.resample_every_used for c in (short, long)] == [12, 300]
    assert SAEConfig(activation="topk", tokens=1000, batch=10, dead_after=7).dead_after_used == 7


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    config = CLTConfig(tokens=1000, batch=10, lr=1.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([0.05 * i for i in range(20, 0, -1)])
    assert learning_rate(config, config.steps) == 0


def test_the_sparsity_weight_rises_linearly_and_stays():
    config = CLTConfig(tokens=100, batch=1, sparsity=2.0, sparsity_warmup=0.5)
    assert sparsity_weight(config, 24) == pytest.approx(1.0)
    assert [sparsity_weight(config, step) for step in (49, 50, 99)] == [2.0, 2.0, 2.0]
    assert sparsity_weight(CLTConfig(sparsity=2.0, sparsity_warmup=0.0), 0) == 2.0


def test_importing_the_packages_and_the_configuration_imports_no_torch():
    code = "import sys, transcoders, transcoders.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_exported_name_is_there():
    import transcoders

    for name in transcoders.__all__:
        assert getattr(transcoders, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = transcoders.nothing
