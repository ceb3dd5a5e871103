"""Shapes in signatures are checked while the tests run; torch uses one thread, so that results are repeatable.

Kernels are left alone by the check: Triton compiles a function's own source. Without a GPU its interpreter runs them.
"""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tests.checked


class Unchecked:
    """Finds modules whose name ends in `gpu`, where kernels live, before the hook that checks shapes does."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path, target) if name.endswith("gpu") else None


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

# What a checked module is the first to import is compiled anew in each session; so large packages are imported here.
import pandas  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import transformer_lens  # noqa: E402, F401

# A shell's background job is deaf to Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)
tests.checked.install()
sys.meta_path.insert(0, Unchecked)


def pytest_collection_finish() -> None:
    """What has been imported stays, so that the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _quiet_torch() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, text and golden references beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference files in {SHARED}, which are absent")
    return SHARED
