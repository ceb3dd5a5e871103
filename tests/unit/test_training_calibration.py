"""Thresholds in the place of TopK: what stays, what is measured, and against what."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from transcoders import calibrate_topk, held_out_rows, random_dictionaries
from transcoders.data import Corpus, sites_of
from transcoders.dictionaries import JumpReLU, TopK
from transcoders.errors import DictionaryError

TEXT = Corpus(
    "text", lambda: iter([f"The capital of state {i} is Austin and Mary went to the store. " * 4 for i in range(80)])
)


@pytest.fixture
def sets():
    made = random_dictionaries("plt", n_layers=4, d_model=128, features=40, activation="topk", k=6, seed=2)
    return made.requires_grad_(False)


def test_the_dictionaries_given_stay_and_absent_layers_are_left_out(pocket, sets):
    partial = sets.only([0, 2])
    folded: Any
    folded, layers = calibrate_topk(pocket, partial, TEXT, tokens=500, context=50)
    assert [isinstance(d.activation, TopK) for d in partial.layers] == [True, False, True, False]
    assert [isinstance(d.activation, JumpReLU) for d in folded.layers] == [True, False, True, False]
    assert folded.provenance.config["calibrated"]["corpus"] == "text"
    assert "calibrated" not in partial.provenance.config
    assert [layer.l0_before for layer in layers][1::2] == [0, 0]


@pytest.mark.parametrize("first", [1, 4])
def test_what_is_measured_is_what_a_dense_run_counts(pocket, sets, first):
    sets.provenance = replace(sets.provenance, first=first)
    folded: Any
    folded, layers = calibrate_topk(pocket, sets, TEXT, tokens=400, context=50)
    rows = held_out_rows(pocket.with_bos(True), TEXT, tokens=400, context=50)
    reads, writes = sites_of(pocket, rows, sets.reads, sets.writes, first=first)
    for before, made in ((True, sets), (False, folded)):
        for layer, found in enumerate(layers):
            d = made[layer].double()
            x, y = reads[:, layer].double(), writes[:, layer].double()
            a = d.encode(x)
            fvu = (y - d.decode(a)).square().sum() / (y - y.mean(0)).square().sum()
            assert float((a > 0).sum(1).double().mean()) == pytest.approx(found.l0_before if before else found.l0_after)
            assert float(fvu) == pytest.approx(found.fvu_before if before else found.fvu_after, rel=1e-4)


def test_what_has_no_topk_is_refused(pocket):
    plain = random_dictionaries("plt", n_layers=4, d_model=128, features=40, activation="relu")
    with pytest.raises(DictionaryError, match="these dictionaries have 'relu'"):
        calibrate_topk(pocket, plain, TEXT, tokens=200, context=50)


def test_dictionaries_of_another_width_are_refused(pocket):
    narrow = random_dictionaries("plt", n_layers=4, d_model=16, features=40, activation="topk", k=3)
    with pytest.raises(DictionaryError, match="width 16"):
        calibrate_topk(pocket, narrow, TEXT, tokens=200, context=50)


def test_l0_stays_near_k_on_the_text_of_calibration(pocket, sets):
    _, layers = calibrate_topk(pocket, sets, TEXT, tokens=1000, context=50)
    for layer in layers:
        assert layer.l0_before == pytest.approx(6, abs=0.2)
        assert layer.l0_after == pytest.approx(6, rel=0.35)
    assert torch.is_grad_enabled()
