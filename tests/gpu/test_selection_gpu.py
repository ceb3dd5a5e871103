"""The k largest values by Triton's radix selection, against sorts; without a CUDA device in Triton's interpreter.

And that no kernel moves more than it has to, by the bytes of what it is given.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.device import Tape, device_form, kernels_on
from transcoders.kernels import products, ranked

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="needs triton, which there is for Linux")
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def gpu():
    from transcoders.kernels import selection_gpu

    return selection_gpu


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def awkward(n: int, dtype: torch.dtype):
    """Rows that are hard: ties, all alike, all negative, infinite, tiny and huge."""
    x = drawn(6, n, dtype=dtype)
    x[1] = x[1].round()
    x[2] = 1.5
    x[3] = -x[3].abs() - 1
    x[4, ::3], x[4, 1::3] = torch.inf, -torch.inf
    x[5] *= torch.logspace(-30, 30, n, device=x.device).to(dtype) if dtype != torch.float16 else 1
    return x


def sorted_choice(rows, k):
    """The k largest of each row, of equal ones the first; places ascending."""
    index = rows.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return rows.gather(1, index), index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(40, 1), (40, 7), (40, 40), (1500, 32)])
def test_rows_list_exactly_k_in_the_order_of_their_places(gpu, dtype, n, k):
    rows = awkward(n, dtype)
    for found, expected in zip(gpu.rows_listed(rows, k), sorted_choice(rows, k), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_are_those_of_topk(gpu, dtype):
    rows = drawn(5, 300, dtype=dtype)
    value, _ = gpu.rows_listed(rows, 20)
    assert torch.equal(value.sort(dim=1, descending=True).values, rows.topk(20, dim=1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_list_exactly_k_of_all_layers(gpu, dtype):
    h = awkward(60, dtype).view(3, 2, 60)
    for found, expected in zip(gpu.tokens_listed(h, 9), sorted_choice(h.transpose(0, 1).flatten(1), 9), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("over_layers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_keep_exactly_k_of_a_layer_or_of_all(gpu, dtype, over_layers):
    h = awkward(60, dtype).view(3, 2, 60)
    kept = gpu.rows_kept(h, 9, over_layers=over_layers)
    rows = h.transpose(0, 1).flatten(1) if over_layers else h.flatten(0, 1)
    dense = torch.zeros_like(rows).scatter(1, sorted_choice(rows, 9)[1], sorted_choice(rows, 9)[0].relu())
    expected = dense.unflatten(1, (3, 60)).transpose(0, 1) if over_layers else dense.view(3, 2, 60)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 250, 600])
def test_groups_list_exactly_k_and_keep_what_equals_the_last(gpu, dtype, k, monkeypatch):
    monkeypatch.setattr(gpu, "_BLOCK", 128)  # several programs
    monkeypatch.setattr(gpu, "_TILES", 2)
    groups = awkward(600, dtype)[:4]
    kth = groups.sort(dim=1, descending=True).values[:, k - 1]
    for found, expected in zip(gpu.groups_listed(groups, k), sorted_choice(groups, k), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(gpu.groups_kept(groups, k), groups.where((groups >= kth[:, None]) & (groups > 0), 0))


@pytest.mark.parametrize("over_layers", [False, True])
@pytest.mark.parametrize("keep", [ranked.keep_of_rows, ranked.keep_of_all])
def test_gradients_are_those_of_the_sorting_form(gpu, keep, over_layers, monkeypatch):
    h = drawn(2, 6, 50, dtype=torch.float64)
    results = []
    for kernels in (None, gpu):
        monkeypatch.setattr(ranked, "_kernels", lambda h, kernels=kernels: kernels)
        leaf = h.clone().requires_grad_()
        a = keep(leaf, 5, over_layers=over_layers)
        (a * drawn(2, 6, 50, dtype=torch.float64, seed=1)).sum().backward()
        results.append((a.detach(), leaf.grad))
    for sorting, radix in zip(*results, strict=True):
        assert torch.equal(sorting, radix)


def test_bytes_are_within_twice_the_least(gpu):
    """TopK's dense form reads h and writes a; its list reads h once from memory, and again from the cache."""
    h, tape = drawn(1, 4, 2048), Tape()
    with kernels_on(tape, [gpu]):
        gpu.rows_kept(h, 8, over_layers=False)
        gpu.rows_listed(h[0], 8)
    kept, listed = tape.operations
    size = h.numel() * h.element_size()
    assert kept.bytes <= 2 * (2 * size)  # the result stands for the two lists it has no use of
    assert listed.bytes <= 2 * (size + 4 * 8 * (4 + 8))


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kernels", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["SAEConfig", "CLTConfig"])
def test_a_training_step_with_these_kernels_waits_for_nothing_and_is_the_processors(
    gpu, kind, kernels, activation, monkeypatch
):
    from tests.unit.test_training_device import COMMON, started, stepped
    from transcoders import training
    from transcoders.kernels import gpu as sums

    config = getattr(training, kind)(kernels=kernels, activation=activation, remedy="none", **COMMON)
    layers = 2 if config.kind == "clt" else 1
    here, batches = started(config, layers)
    there, _ = started(config, layers)
    stepped(here, batches, range(1))
    monkeypatch.setattr(ranked, "_kernels", lambda h: gpu)
    monkeypatch.setattr(products, "backend", lambda table: sums)
    with device_form(), Tape() as tape, kernels_on(tape, [gpu, sums]):
        stepped(there, batches, range(1))
    assert tape.waits == []
    names = tape.counts()
    assert names["_rows_kernel" if activation == "topk" else "_count_kernel"] > 0
    assert (names["_sum_kernel"] > 0) == (kernels == "sparse")
    for name, tensor in there.tensors().items():
        torch.testing.assert_close(tensor, here.tensors()[name], msg=name, rtol=1e-4, atol=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from transcoders.kernels import gpu, selection_gpu

kinds = {"k": "i32", "n": "i32", "width": "i32", "outer": "i32", "tiles": "i32", "index": "*i64", "histogram": "*i32"}
kinds |= {"left": "*i32", **dict.fromkeys(("over", "equal", "over_before", "ties_before"), "*i64")}
constants = {"block": 64, "apart": True, "digit": 1}
for number, bits in (("*fp32", 32), ("*bf16", 16)):
    for dense in (True, False):
        for name, kernel in vars(selection_gpu).items():
            if not name.endswith("_kernel") or not dense and "dense" not in kernel.arg_names:
                continue
            values = constants | {"bits": bits, "dense": dense}
            of_type = kinds | {"prefix": "*i32", "h": number, "value": number, "kept": number}
            signature = {a: "constexpr" if a in values else of_type[a] for a in kernel.arg_names}
            given = {(kernel.arg_names.index(a),): v for a, v in values.items() if a in kernel.arg_names}
            made = triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32))
            print(name, bits, dense, len(made.asm["ptx"]))
    of_type = dict.fromkeys(("values", "inputs", "table", "out"), number)
    of_type |= {"column": "*i64", "start": "*i64", "d": "i32"}
    for name in ("_sum_kernel", "_dot_kernel"):
        kernel, values = getattr(gpu, name), {"block": 64, "double": False}
        signature = {a: "constexpr" if a in values else of_type[a] for a in kernel.arg_names}
        given = {(kernel.arg_names.index(a),): v for a, v in values.items()}
        made = triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32))
        print(name, bits, len(made.asm["ptx"]))
"""


def test_every_kernel_compiles_for_a_gpu_without_one(gpu):
    """To the instructions of compute capability 9.0; the interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    from transcoders.kernels import gpu as sums

    assert compiled == {name for module in (gpu, sums) for name in vars(module) if name.endswith("_kernel")}
