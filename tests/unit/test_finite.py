"""A NaN or an infinity is refused where it comes in, and passes no check on its way."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitsae.attribution import attribute
from circuitsae.cli import main
from circuitsae.commands.graph_folders import check_identities
from circuitsae.pocket import MODEL_DIR
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import Validation, validate
from transcoders import load_model, save_dictionaries
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import CheckFailedError, ModelError
from transcoders.random_models import random_model


def test_a_model_with_a_weight_that_is_not_finite_is_refused(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "c_fc.weight" in name)
    tensors[name][1, 2] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has a weight in .* that is not a finite number"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_dictionary_changed_after_loading_does_not_pass_validation(value):
    model = random_model("gpt2", n_layers=2, d_model=16, n_heads=2)
    dictionaries = random_dictionaries("plt", n_layers=2, d_model=16, features=24, activation="relu", seed=1)
    replacement = ReplacementModel(model, dictionaries.requires_grad_(False))
    graph = attribute(replacement, torch.tensor([1, 2, 3, 4])).prune()
    assert np.isfinite(validate(replacement, graph, edges=5, controls=2).frozen_error)
    dictionaries[1].W_dec.data.fill_(value)
    with pytest.raises(CheckFailedError, match="not a finite number|not finite numbers"):
        validate(replacement, graph, edges=5, controls=2)


@pytest.mark.parametrize(("frozen", "logit"), [(np.inf, 0.0), (0.0, np.inf), (1.0, 0.0), (np.nan, 0.0)])
def test_an_identity_that_is_off_fails(frozen, logit):
    held = partial(Validation, pd.DataFrame())
    with pytest.raises(CheckFailedError):
        check_identities(held(frozen_error=frozen, logit_error=logit), "float32")
    check_identities(held(frozen_error=1e-6, logit_error=np.nan), "float32")  # TopK over layers
    check_identities(held(frozen_error=np.nan, logit_error=0.0, errors="linear"), "float32")  # features with the errors
    with pytest.raises(CheckFailedError):
        check_identities(held(frozen_error=np.nan, logit_error=0.0, response="linear"), "float32")


def test_derivatives_may_round_as_differences_of_runs_do():
    with pytest.raises(CheckFailedError, match=r"frozen model differs .* by 1\.0e-03, more than 1e-04"):
        check_identities(Validation(pd.DataFrame(), response="frozen", frozen_error=1e-3, logit_error=0.0), "float32")
    check_identities(Validation(pd.DataFrame(), response="linear", frozen_error=1e-3, logit_error=0.0), "float32")
    with pytest.raises(CheckFailedError, match="small changes differ from the graph"):
        check_identities(Validation(pd.DataFrame(), response="linear", frozen_error=2e-2, logit_error=0.0), "float32")


def test_nan_in_the_decoder_of_an_inactive_feature_ends_in_one_sentence(tmp_path, capsys):
    dictionaries = random_dictionaries("clt", n_layers=4, d_model=128, features=8, activation="relu", seed=0)
    dictionaries.b_enc.data.fill_(-1e6)  # no feature fires
    save_dictionaries(dictionaries, tmp_path / "d")
    path = tmp_path / "d" / "weights.safetensors"
    identity = json.loads((tmp_path / "d" / "config.json").read_text())["id"]
    tensors = load_file(path)
    tensors["W_dec.2"][3] = torch.nan
    save_file(tensors, path, metadata={"id": identity})
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "a b c", "--dictionaries", str(tmp_path / "d"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "W_dec.2 that is not a finite number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
