"""The Triton kernels against dense float64 products, and a whole step against the processor's.

Without a GPU they can be checked in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m gpu tests/gpu`.
"""

import os

import pytest
import torch

from transcoders import kernels

pytest.importorskip("triton", reason="needs triton, which comes with torch's CUDA builds")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def sample(n_layers=2, batch=5, features=33, density=0.2):
    mask = torch.rand(n_layers, batch, features, generator=torch.Generator().manual_seed(3)) < density
    mask[0, 1] = False  # a token without active features
    return kernels.active_from_mask(mask.to(DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [16, 70, 1500])
def test_products_against_dense_float64(dtype, d):
    from transcoders.kernels import gpu

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


def test_no_active_feature():
    from transcoders.kernels import gpu

    active = kernels.active_from_mask(torch.zeros(1, 3, 7, dtype=torch.bool, device=DEVICE))
    none = torch.zeros(0, device=DEVICE)
    assert gpu.gather_sum(none, *active.rows, draw(7, 4)).eq(0).all()
    assert gpu.gather_dot(draw(3, 4), *active.rows, draw(7, 4)).shape == (0,)


@pytest.mark.skipif(INTERPRETED, reason="tensors of a processor take the processor's kernels")
@pytest.mark.parametrize("encode", [kernels.topk_encode, kernels.batch_topk_encode])
@pytest.mark.parametrize("over_layers", [False, True])
def test_a_step_is_that_of_the_processor(encode, over_layers):
    x, W_enc, b_enc = (
        draw(3, 32, 64, dtype=torch.float64),
        draw(3, 64, 512, seed=1, dtype=torch.float64),
        draw(3, 512, seed=2, dtype=torch.float64),
    )
    W_dec = [draw(512, 3 - layer, 64, seed=5 + layer, dtype=torch.float64) for layer in range(3)]
    gradients = []
    for device in ("cpu", DEVICE):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, W_enc, b_enc, *W_dec)]
        found = encode(*leaves[:3], 8, over_layers=over_layers)
        y = kernels.cross_layer_decode(found.value.relu(), found.active, leaves[3:])
        gradients.append(torch.autograd.grad(y.square().mean(), leaves))
    for cpu, cuda in zip(*gradients, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu)
    assert gradients[0][1].abs().sum() > 0
