"""Shapes in signatures are checked while the tests run; torch uses one thread, so that results are repeatable."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["circuitsae", "transcoders"], "beartype.beartype")

import torch  # noqa: E402

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
