"""What a training is said to cost is what it takes, counted on a run."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transcoders.training import CLTConfig, SAEConfig, TranscoderConfig, training_cost
from transcoders.training.initialise import initial_parameters
from transcoders.training.losses import losses
from transcoders.training.parameters import aligned_to
from transcoders.training.step import Run

LAYERS, D, BATCH = 3, 8, 32
CONFIGS = [
    SAEConfig(features=24, batch=BATCH, activation="topk", k=3, centred=False),
    TranscoderConfig(features=24, batch=BATCH, activation="relu", ema=0.9),
    TranscoderConfig(features=24, batch=BATCH, skip=True),
    CLTConfig(features=24, batch=BATCH, activation="jumprelu"),
    CLTConfig(features=24, batch=BATCH, activation="relu", skip=True),
    CLTConfig(features=24, batch=BATCH, activation="topk", k=9, decoder_rank=2),
]
IDS = [f"{c.kind}-{c.activation}" for c in CONFIGS]


def run_of(config):
    x = torch.randn(64, LAYERS, D, generator=torch.Generator().manual_seed(0))
    run = Run.start(config, x, x)
    run.step(0, x[:BATCH], x[:BATCH])
    return run


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_parameters_and_bytes_are_those_of_a_run(config):
    run, cost = run_of(config), training_cost(config, n_layers=LAYERS, d_model=D)
    assert cost.parameters == sum(p.numel() for p in run.weights.parameters())
    tensors = run.tensors()
    moments = [t for name, t in tensors.items() if "exp_avg" in name]
    averaged = [t for name, t in tensors.items() if name.startswith("averaged.")]
    assert cost.weights == sum(p.nbytes for p in run.weights.parameters())
    assert cost.moments == sum(t.nbytes for t in moments)
    assert cost.averaged == sum(t.nbytes for t in averaged)
    assert cost.counters == run.counter.since_fired.nbytes
    assert cost.gradients == cost.weights  # few enough for one part
    assert cost.checkpoint == cost.weights + cost.moments + cost.averaged


@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
@pytest.mark.parametrize("of", [SAEConfig, CLTConfig])
@pytest.mark.parametrize("choice", [{"activation": "topk", "k": 1}, {"activation": "relu"}], ids=["unit", "free"])
def test_free_coordinates_are_the_rank_of_what_is_applied_by_what_is_stored(choice, of, aligned):
    """The Jacobian, by autograd, of encoder, biases, and decoders brought to norm one where they are kept there."""
    config = of(features=3, batch=BATCH, aligned=aligned, **choice)
    x = torch.randn(64, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = initial_parameters(config, x, x)
    weights.W_enc.data += 0.3 * torch.randn(weights.W_enc.shape, generator=torch.Generator().manual_seed(1))
    norms = [W.flatten(1).norm(dim=1)[:, None, None] if config.unit_decoders else 1.0 for W in weights.W_dec]
    decoders = [W / norm for W, norm in zip(weights.W_dec, norms, strict=True)]
    written = torch.stack([W.sum(dim=1) for W in decoders])
    encoder = aligned_to(written, weights.W_enc) if aligned else weights.W_enc
    torch.testing.assert_close(encoder, weights.encoder())
    applied = torch.cat([p.flatten() for p in (encoder, weights.b_enc, weights.b_dec, *decoders)])
    stored = list(weights.parameters())
    each = torch.eye(len(applied), dtype=applied.dtype)
    rows = torch.autograd.grad(applied, stored, each, is_grads_batched=True)
    jacobian = torch.cat([row.flatten(1) for row in rows], dim=1).double()
    cost = training_cost(config, n_layers=2, d_model=4)
    assert jacobian.shape[1] == cost.parameters
    assert int(torch.linalg.matrix_rank(jacobian, tol=1e-8)) == cost.free


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_operations_of_dense_products_are_those_that_torch_counts(config):
    run = run_of(config)
    x = torch.randn(LAYERS, BATCH, D)
    with FlopCounterMode(display=False) as counter:
        losses(run.weights, x, x, config, sparsity_weight=1.0, dead=None).total.backward()
    counted = counter.get_total_flops() / BATCH
    assert training_cost(config, n_layers=LAYERS, d_model=D).dense_flops == pytest.approx(counted, rel=1e-6)


def test_sparse_products_take_what_active_features_take():
    config = TranscoderConfig(features=4096, activation="topk", k=16)
    cost = training_cost(config, n_layers=2, d_model=64)
    assert cost.sparse_flops == 2 * (2 * 64 * 4096 + 2 * 64 * 16 + 3 * 2 * 64 * 16)
    assert training_cost(config, n_layers=2, d_model=64, l0=4096.0).sparse_flops == cost.dense_flops


def test_ranks_share_what_parallel_names():
    sizes: Any = {"n_layers": 4, "d_model": 16}
    alone = training_cost(SAEConfig(features=64, activation="topk", k=4), **sizes)
    assert alone.network == 0
    data, layers, features = (
        training_cost(SAEConfig(features=64, activation="topk", k=4, parallel=how), **sizes, ranks=2)
        for how in ("data", "layers", "features")
    )
    assert data.weights == alone.weights
    assert data.activations == alone.activations // 2
    assert layers.weights * 2 == alone.weights
    assert layers.gradients * 2 == alone.gradients
    assert alone.weights / 2 < features.weights < 0.51 * alone.weights  # each rank has the biases of the outputs
    assert data.parameters == layers.parameters == features.parameters
    assert data.network == data.weights  # 2 · 1/2 of all gradients
    assert layers.network == 4 * 512 * 4 * 16 // 4


MEASURED = """
import gc, json, re, sys
from pathlib import Path
import torch
from transcoders.training import CLTConfig, SAEConfig, TranscoderConfig, training_cost
from transcoders.training.step import Run

def resident(field):
    return 1024 * int(re.search(rf"^{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])

def measure(config, n_layers, d_model):
    x = torch.randn(config.batch, n_layers, d_model)
    gc.collect()
    before = resident("VmRSS")
    run = Run.start(config, x, x)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for step in range(3):
        run.step(step, x, x)
    return resident("VmHWM") - before, training_cost(config, n_layers=n_layers, d_model=d_model).memory

kinds = {"topk": TranscoderConfig, "relu": TranscoderConfig, "batchtopk": SAEConfig, "gated": SAEConfig}
kinds["jumprelu"] = CLTConfig
common = {"batch": 512, "tokens": 51200, "k": 32, "kernels": "dense"}
found = {}
for activation, kind in kinds.items():
    measure(kind(activation=activation, features=64, **common), 2, 32)  # what libraries take
    found[activation] = measure(kind(activation=activation, features=4096, **common), 2, 384)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_what_a_step_takes_to_a_tenth():
    """Where the allocator gives back what was freed."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for activation, (taken, said) in json.loads(done.stdout).items():
        assert said == pytest.approx(taken, rel=0.1), activation
