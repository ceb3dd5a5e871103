"""Names that are imported when they are first used (PEP 562), so that importing a package does not import torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package, given the names each of its modules exports."""
    home = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name == "__version__":
            return version("circuitsae")  # the distribution of both packages
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return get, sorted(home)
