"""The public face: fifteen names at the top, and names of before that still work for a release."""

import importlib

import pytest

import circuitsae

TOP = {
    "AttributionGraph", "LogitTargets", "ReplacementModel", "TopLogits", "Trace", "Validation", "attribute",
    "faithfulness", "intervene", "load_dictionaries", "load_graph", "load_model", "random_model", "validate",
    "write_html",
}  # fmt: skip
MOVED = {
    "Node": "circuitsae.graph", "NodeKind": "circuitsae.graph", "prune": "circuitsae.graph",
    "node_change": "circuitsae.interventions", "reads_after": "circuitsae.interventions",
    "CLTConfig": "transcoders", "SAEConfig": "transcoders", "TranscoderConfig": "transcoders", "train": "transcoders",
}  # fmt: skip


def test_fifteen_names_stand_at_the_top():
    assert set(circuitsae.__all__) == TOP
    for name in TOP:
        assert getattr(circuitsae, name).__name__ == name


@pytest.mark.parametrize("name", MOVED)
def test_a_name_of_before_still_works_and_says_where_it_is(name):
    with pytest.warns(DeprecationWarning, match=f"circuitsae.{name} is now {MOVED[name]}.{name}"):
        found = getattr(circuitsae, name)
    assert found is getattr(importlib.import_module(MOVED[name]), name)


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        circuitsae.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
