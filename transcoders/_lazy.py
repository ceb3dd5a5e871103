"""Names that are imported when they are first used (PEP 562), so that importing a package does not import torch."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any


def lazy_exports(
    package: str, modules: Mapping[str, tuple[str, ...]], deprecated: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package, given the names each of its modules exports.

    `deprecated`: names of before, each with the full name of what it is today (`circuitsae.graph.Node`); they still
    work, say so with a `DeprecationWarning`, and are not in `__all__`.
    """
    home = {name: module for module, names in modules.items() for name in names}
    moved = deprecated or {}

    def get(name: str) -> Any:
        if name == "__version__":
            return version("circuitsae")  # the distribution of both packages
        if name in moved:
            warnings.warn(f"{package}.{name} is now {moved[name]}.", DeprecationWarning, stacklevel=2)
            module, _, today = moved[name].rpartition(".")
            return getattr(import_module(module), today)
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return get, sorted(home)


def public(name: str) -> Any:
    """What a package exports as `name` (`transcoders.load_model`), found when it is called.

    For what users look for on a class that lies below what does it: `from_pretrained`, and `write_html` of a graph.
    """
    package, _, attribute = name.rpartition(".")
    return getattr(import_module(package), attribute)
