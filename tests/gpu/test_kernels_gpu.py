"""The Triton kernels against dense float64 products, and a whole step against the processor's.

Without a CUDA device Triton's interpreter runs them on the processor (tests/conftest.py), with every run of the suite.
"""

import ast
import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tests.device import device_form
from transcoders import kernels
from transcoders.kernels import products

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="needs triton, which there is for Linux")
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def gpu():
    from transcoders.kernels import gpu

    return gpu


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def sample(n_layers=2, batch=5, features=33, density=0.2):
    mask = torch.rand(n_layers, batch, features, generator=torch.Generator().manual_seed(3)) < density
    mask[0, 1] = False  # a token without active features
    return kernels.active_from_mask(mask.to(DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [16, 70, 1500])
def test_products_against_dense_float64(gpu, dtype, d):
    active = sample()
    values, table, x = (
        draw(len(active.feature), dtype=dtype),
        draw(66, d, seed=1, dtype=dtype),
        draw(10, d, seed=2, dtype=dtype),
    )
    a = torch.zeros(10, 66, dtype=torch.float64, device=DEVICE)
    a[active.row, active.feature] = values.double()
    sums = gpu.gather_sum(values, *active.rows, table).double()
    torch.testing.assert_close(sums, a @ table.double(), atol=TOLERANCE[dtype] * d**0.5, rtol=TOLERANCE[dtype])
    dots = gpu.gather_dot(x, *active.rows, table).double()
    dense = (x.double() @ table.double().T)[active.row, active.feature]
    torch.testing.assert_close(dots, dense, atol=TOLERANCE[dtype] * d**0.5, rtol=TOLERANCE[dtype])
    outer = gpu.gather_sum(values[active.order], *active.by_feature, x).double()
    torch.testing.assert_close(outer, a.T @ x.double(), atol=TOLERANCE[dtype] * d**0.5, rtol=TOLERANCE[dtype])


def test_no_active_feature(gpu):
    active = kernels.active_from_mask(torch.zeros(1, 3, 7, dtype=torch.bool, device=DEVICE))
    none = torch.zeros(0, device=DEVICE)
    assert gpu.gather_sum(none, *active.rows, draw(7, 4)).eq(0).all()
    assert gpu.gather_dot(draw(3, 4), *active.rows, draw(7, 4)).shape == (0,)


@pytest.mark.parametrize("encode", [kernels.topk_encode, kernels.batch_topk_encode])
@pytest.mark.parametrize("over_layers", [False, True])
def test_a_step_is_that_of_the_processor(gpu, encode, over_layers, monkeypatch):
    x, W_enc, b_enc = (
        draw(3, 8, 16, dtype=torch.float64),
        draw(3, 16, 48, seed=1, dtype=torch.float64),
        draw(3, 48, seed=2, dtype=torch.float64),
    )
    W_dec = [draw(48, 3 - layer, 16, seed=5 + layer, dtype=torch.float64) for layer in range(3)]
    gradients = []
    for device, backend, form in (("cpu", None, nullcontext()), (DEVICE, gpu, device_form())):
        if backend is not None:  # tensors of a processor would take the processor's kernels
            monkeypatch.setattr(products, "backend", lambda table: gpu)
        leaves = [t.detach().to(device).requires_grad_() for t in (x, W_enc, b_enc, *W_dec)]
        with form:
            found = encode(*leaves[:3], 4, over_layers=over_layers)
            y = kernels.cross_layer_decode(found.value.relu(), found.active, leaves[3:])
            gradients.append(torch.autograd.grad(y.square().mean(), leaves))
    for cpu, triton in zip(*gradients, strict=True):
        torch.testing.assert_close(triton.cpu(), cpu)
    assert gradients[0][1].abs().sum() > 0


def test_every_kernel_is_run_by_the_two_products(gpu, monkeypatch):
    launched = []
    for name, kernel in kernels_of(gpu).items():
        launched.append(MagicMock())
        launched[-1].__getitem__.side_effect = kernel.__getitem__
        monkeypatch.setattr(gpu, name, launched[-1])
    test_products_against_dense_float64(gpu, torch.float32, 16)
    assert launched
    assert all(kernel.__getitem__.called for kernel in launched)


def test_no_kernel_is_wrapped_by_the_check_of_shapes(gpu):
    assert kernels_of(gpu)
    for kernel in kernels_of(gpu).values():
        assert not hasattr(kernel.fn, "__wrapped__")
        assert inspect.getsourcefile(kernel.fn) == gpu.__file__
    assert hasattr(products.weighted_sum, "__wrapped__")  # as all else is


def test_names_of_modules_of_kernels_end_in_gpu():
    """So that the check of shapes knows them."""
    sources = [path for package in ("circuitsae", "transcoders") for path in (ROOT / package).rglob("*.py")]
    using = [path for path in sources if "triton" in imported(ast.parse(path.read_text(encoding="utf-8")))]
    assert {path.name for path in using} == {"gpu.py", "selection_gpu.py"}


def kernels_of(module) -> dict[str, Any]:
    """What `triton.jit` made: compiled or interpreted, it keeps the function as `fn`."""
    return {name: value for name, value in vars(module).items() if hasattr(value, "fn")}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
