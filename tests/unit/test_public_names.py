"""The public face: fifteen names at the top, and names of before that still work for a release."""

import importlib
from pkgutil import walk_packages
from types import ModuleType

import pytest

import circuitsae
import transcoders

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


def test_no_module_hides_a_name_of_its_package():
    """A package that imports lazily gets its modules as attributes once they are imported, over names like theirs."""
    hidden = []
    for root in (circuitsae, transcoders):
        found = [root.__name__, *(m.name for m in walk_packages(root.__path__, f"{root.__name__}."))]
        modules = [importlib.import_module(name) for name in found]
        for package in (module for module in modules if hasattr(module, "__path__")):
            names = getattr(package, "__all__", ())
            hidden += [f"{package.__name__}.{n}" for n in names if isinstance(getattr(package, n), ModuleType)]
    assert hidden == []
