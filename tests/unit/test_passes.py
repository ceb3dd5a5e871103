"""Passes that leave out the positions before a change, against passes over the whole prompt."""

from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch

from circuitsae.attribution import attribute
from circuitsae.interventions import REGIMES, Recording, RegimeName, node_change, passes
from circuitsae.interventions.passes import first_positions, goes_on
from circuitsae.interventions.writers import Shares, Writers
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.measuring import Asked, Targets, effects, effects_in
from transcoders.dictionaries import random_dictionaries
from transcoders.random_models import Family, random_model

TOKENS = torch.tensor([0, 5, 11, 5, 8, 3, 9, 21, 5])
LAYERS = 3


def setting(family: Family, kind: Literal["plt", "clt"], **options: Any) -> tuple[Recording, Shares, Targets]:
    model = ReplacementModel(
        random_model(family, n_layers=LAYERS, d_model=16, dtype=torch.float64),
        random_dictionaries(kind, n_layers=LAYERS, d_model=16, features=12, dtype=torch.float64, **options),
    )
    graph = attribute(model, TOKENS).prune(nodes=1.0, edges=1.0)
    prompt = Recording(model, model.trace(TOKENS))
    written = [node for node in graph.nodes if node.kind in ("feature", "error", "token")][::3]
    read = [node for node in graph.nodes if node.kind in ("feature", "logit")]
    writers = Writers(model, prompt, [node_change(model, prompt.trace, node) for node in written])
    return prompt, Shares.removing(writers), Targets(model, prompt.trace, read)


def both(monkeypatch, run):
    """With passes of the whole prompt, and with as many as there are first positions."""
    found = []
    for worth in (10**9, 0):
        monkeypatch.setattr(passes, "WORTH", worth)
        monkeypatch.setattr(passes, "worth_launches", lambda _, worth=worth: worth)
        found.append(run())
    return found


FAMILIES: tuple[Family, ...] = ("gpt2", "gptj", "bloom", "llama", "qwen3", "olmo2", "falcon", "granite", "mixtral")
WINDOWED: tuple[Family, ...] = ("mistral", "gemma2", "gpt_oss")
"""Their caches keep a window that is shorter than the prompt."""


@pytest.mark.parametrize("family", FAMILIES + WINDOWED)
def test_positions_before_a_change_need_not_be_run(family, monkeypatch):
    prompt, shares, targets = setting(family, "plt", skip=True)
    regimes: tuple[RegimeName, ...] = ("model", "graph")
    for regime in regimes:
        whole, parts = both(monkeypatch, partial(effects, prompt.model, prompt, shares, targets, regime))
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-9 * np.abs(whole).max(), err_msg=regime)
        assert np.abs(whole).max() > 1e-3
    assert [past is not None for past in prompt.past.values()] == [family not in WINDOWED] * 3


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_goes_on_from_a_position(kind, regime, monkeypatch):
    prompt, shares, targets = setting("llama", kind)
    whole, parts = both(monkeypatch, lambda: effects(prompt.model, prompt, shares, targets, regime))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-9 * np.abs(whole).max())


def test_rows_of_several_regimes_go_on_from_a_position(monkeypatch):
    prompt, shares, targets = setting("gpt2", "clt")
    regimes: tuple[RegimeName, ...] = ("model", "graph", "direct", "linear", "frozen")
    asked: list[Asked] = [(shares, regime) for regime in regimes]
    whole, parts = both(monkeypatch, lambda: effects_in(prompt.model, prompt, asked, targets, together=True))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-9 * np.abs(one).max())


def _refuses(*_, **how):
    raise TypeError(f"unexpected keyword argument {next(iter(how))!r}")


@pytest.mark.parametrize(("name", "stand_in"), [("new_cache", lambda: None), ("run_hooked", _refuses)])
def test_where_the_model_does_not_go_on_whole_prompts_are_run(name, stand_in, monkeypatch):
    prompt, shares, targets = setting("gpt2", "plt")
    whole = effects(prompt.model, prompt, shares, targets, "model")
    monkeypatch.setattr(passes, "WORTH", 0)
    lm = prompt.model.model
    monkeypatch.setattr(lm, name, stand_in)  # as of a model without a cache
    assert not goes_on(prompt, 5)
    np.testing.assert_allclose(effects(prompt.model, prompt, shares, targets, "model"), whole, rtol=0, atol=0)


def test_rows_begin_at_few_positions():
    assert first_positions(np.arange(9), 9, 0).tolist() == [0, 0, 0, 0, 0, 5, 5, 7, 8]
    assert first_positions(np.array([0]), 1, 0).tolist() == [0]
    pos = np.repeat([3, 60, 99], [5, 2, 90])
    first = first_positions(pos, 100, 100)
    assert (first <= pos).all()
    assert dict(zip(pos.tolist(), first.tolist(), strict=True)) == {3: 0, 60: 50, 99: 99}
