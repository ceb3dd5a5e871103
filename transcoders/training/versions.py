"""Which libraries trained a dictionary."""

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("circuitsae", "torch", "transformer-lens", "transformers")


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:  # not installed, or run from a checkout
            continue
    return versions
