"""Which positions have no features goes along to the layouts of other packages and comes back."""

import json
from dataclasses import replace

import pytest

from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.errors import FileFormatError
from transcoders.formats.registry import FORMATS

SAE = {"kind": "sae"}
KINDS = {
    "circuit-tracer": {"kind": "plt"}, "saelens": {"kind": "plt"}, "clt-training": {"kind": "clt"},
    "sparsify": {"kind": "plt", "activation": "topk"}, "clt-forge": {"kind": "clt"},
    "crosslayer-transcoder": {"kind": "clt"}, "gemma-scope": {**SAE, "activation": "jumprelu"},
    "gemma-scope-2": {"kind": "plt", "activation": "jumprelu"}, "dictionary-learning": SAE,
    "openai": SAE,
}  # fmt: skip
LIMITS = {"0.mlp_out": 812.5, "1.mlp_in": 40.25}


def made(case, **left_out):
    dictionaries = random_dictionaries(n_layers=2, d_model=8, features=16, **case)
    dictionaries.provenance = replace(dictionaries.provenance, **left_out)
    return dictionaries


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "native"])
def test_first_position_and_limits_come_back(tmp_path, name):
    save_dictionaries(made(KINDS[name], first=3, limits=LIMITS), tmp_path, format=name)
    found = load_dictionaries(tmp_path).provenance
    assert (found.first, found.limits) == (3, LIMITS)
    save_dictionaries(made(KINDS[name]), tmp_path, format=name)
    found = load_dictionaries(tmp_path).provenance
    assert (found.first, found.limits) == (1, {}), "those of other dictionaries, which were there before"


@pytest.mark.parametrize("limits", [{"0.nowhere": 3.0}, {"0.mlp_out": -1.0}, [], {"0.mlp_out": "large"}])
def test_nonsense_is_refused_by_the_file_s_name(tmp_path, limits):
    save_dictionaries(made(SAE, limits=LIMITS), tmp_path, format="openai")
    (tmp_path / "left_out.json").write_text(json.dumps({"first": 1, "limits": limits}))
    with pytest.raises(FileFormatError, match=r"left_out\.json"):
        load_dictionaries(tmp_path)
