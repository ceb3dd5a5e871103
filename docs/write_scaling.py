"""Writes docs/scaling.md, with what cross-layer transcoders of three sizes need: `python docs/write_scaling.py`."""

# ruff: noqa: E501, as a row of a table is a line

import sys
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "scaling.md"

# An H100 SXM, by its data sheet, and what is assumed of it.
MEMORY, PEAK, BANDWIDTH = 80e9, 989e12, 3.35e12
UTILISATION, MEMORY_USED, NETWORK = 0.3, 0.9, 50e9
BATCH, TOKENS, L0, BUFFER_MB = 4096, 1_000_000_000, 20, 4096
LOW_RANKS = (64, 256)


@dataclass(frozen=True)
class Model:
    name: str
    n_layers: int
    d_model: int
    parameters: float
    features: int


MODELS = (
    Model("GPT-2 small", 12, 768, 124e6, 24_576),
    Model("Gemma 2 2B", 26, 2304, 2.61e9, 16_384),
    Model("Llama 3.1 8B", 32, 4096, 8.03e9, 32_768),
)

TEXT = """# Scaling out

Written by `docs/write_scaling.py`, its tables from `transcoders.training.training_cost`.

Processes that `torchrun` starts train one run together: gloo carries what lies on processors, NCCL what lies on GPUs.
The result is that of a single process, to rounding, and so are metrics and checkpoints.

<!-- skip: starts processes of its own; tests/e2e/test_torchrun.py -->
```bash
torchrun --nproc-per-node 2 -m circuitsae train pocket --features 512 --tokens 2M --parallel features --out runs/two
torchrun --nproc-per-node 8 -m circuitsae train gpt2 --corpus text.txt --parallel features --device cuda --out runs/clt
```

From Python nothing changes: a script that calls `tc.train(model, corpus, tc.CLTConfig(parallel="features"), out=…)` is
started by `torchrun --nproc-per-node 2 script.py`, with the model on the device of its process
(`transcoders.training.distributed.device_of_rank("cuda")`). Every process gets the dictionaries. Only the first one
writes files and shows progress; all read the output folder, so several machines need one that they share.

## What to share

| `parallel` | each process has | what travels in a step | choose it where |
|---|---|---|---|
| `data` (default) | all weights, some tokens of each batch | all gradients, summed | dictionaries are small and the model is slow |
| `layers` | all that belongs to its layers (SAEs, transcoders; not cross-layer ones) | activations of other layers | the layers together are too large for one device |
| `features` | some features of every layer, all tokens | activations, and what the features write, summed | one layer, or a cross-layer transcoder, is too large |

* **The model** runs once for every token: each process reads every N-th row of text, and activations go to those who
  train on them. `buffer_mb` is the memory of all together with `data` and `layers`, of each with `features`.
* **TopK and BatchTopK** rank the features and tokens of all processes; L0, dead latents, thresholds and the penalty's
  weight follow all of them.
* **Checkpoints** are those of a single process, gathered and written tensor by tensor. A run goes on with another number
  of processes, or shared in another way; with the same number its weights are those of an unbroken run, bit by bit on a
  processor.
* **Limits.** `features` must divide by the number of processes, and there must be as many layers as processes share.
  `compile` goes with `layers` alone. NCCL with several GPUs has not been tried yet; gloo is what the tests run.

## When a process ends before its time

Where one is killed, runs out of memory or loses its network, the others stop with one sentence that names the last good
checkpoint; torchrun then ends them all. The same command with `--resume` goes on. A connection that is lost without a
sign is given up after half an hour.

## Several machines

<!-- skip: needs two machines -->
```bash
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-host:29500 --rdzv-id clt \\
  -m circuitsae train gpt2 --corpus text.txt --parallel features --device cuda --out /shared/runs/clt
```

The same command on each machine; under Slurm, `srun` starts it:

```text
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32 --time=24:00:00
#SBATCH --signal=TERM@300 --requeue

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=$(ls -d /shared/runs/clt/checkpoint-* >/dev/null 2>&1 && echo --resume)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \\
  --rdzv-backend c10d --rdzv-endpoint "$host:29500" --rdzv-id "$SLURM_JOB_ID" \\
  -m circuitsae train gpt2 --corpus /shared/text.txt --parallel features --device cuda \\
  --out /shared/runs/clt $again
```

## What a cross-layer transcoder needs

"""


def tables() -> str:
    rows = [
        "| model | layers × features | parameters | weights, gradients, moments | checkpoint | GPUs | memory of each |",
        "|---|---|---|---|---|---|---|",
    ]
    times = [
        "| model | operations a token, dense | sparse | update, moved a step and GPU | GPU-hours, dense | sparse | "
        "network a step and GPU, features | data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        ranks, memory = _fitting(model)
        cost, data = _cost(model, ranks), _cost(model, max(2, ranks), "data")
        network = _cost(model, max(2, ranks)).network
        states = 16 * cost.parameters
        rows.append(
            f"| {model.name} | {model.n_layers} × {model.features:,} | {cost.parameters / 1e9:.2f} G | {_bytes(states)} | "
            f"{_bytes(cost.checkpoint)} | {ranks} | {_bytes(memory)} |"
        )
        hours = [_hours(model, flops, cost.update, ranks) for flops in (cost.dense_flops, cost.sparse_flops)]
        times.append(
            f"| {model.name} | {cost.dense_flops / 1e9:,.1f} GFLOP | {cost.sparse_flops / 1e9:,.2f} GFLOP | "
            f"{_bytes(cost.update)} | {hours[0]:,.0f} | {hours[1]:,.0f} | {_bytes(network)} | {_bytes(data.network)} |"
        )
    return "\n".join([*rows, "", *times])


def page() -> str:
    return f"""{TEXT}Batches of {BATCH:,} tokens, {TOKENS / 1e9:g} G tokens, BatchTopK with {L0} active features a layer and token, shared by
features over as few GPUs of {MEMORY / 1e9:.0f} GB (a power of two) as hold model, buffer, weights, gradients, moments and
activations in {MEMORY_USED:.0%} of their memory.

{tables()}

*Sparse*: only active features are touched; every pre-activation is computed all the same. GPU-hours add three times that
follow one another: the operations, and the model's own, at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (an H100 in bf16; the sparse
kernels are bound by memory and will be slower than that), the update at {BANDWIDTH / 1e12:.2f} TB/s, and the network at
{NETWORK / 1e9:.0f} GB/s and GPU. They are computed, not measured.

Between GPUs `features` sends what {BATCH:,} tokens read and write, `data` the gradients of all weights: with a
cross-layer transcoder, whose decoders grow with the square of the layers, that is the difference between running and not.

```python
from transcoders.training import CLTConfig, training_cost

cost = training_cost(CLTConfig(features=16_384, batch=4096, parallel="features"), n_layers=26, d_model=2304, ranks=8)
print(cost.memory, cost.checkpoint, cost.sparse_flops, cost.network)
```

## With decoders of low rank

Most of these numbers are decoders to later layers. `decoder_rank` lets them go through directions that a layer's
features share ([how](training.md#decoders-of-low-rank)), which leaves the encoders and each layer's own decoder:

{low_rank_table()}

The shared maps are applied to every token, so operations grow with the rank. Weights, gradients, moments, checkpoints
and what is saved are of the factors; the transcoder that a run hands out has full decoders, in main memory. What quality
that leaves has been measured on [small models](../benchmarks/results/low_rank_clt.md) alone.
"""


def low_rank_table() -> str:
    rows = [
        "| model | decoders | parameters | weights, gradients, moments | GPUs | memory of each | operations a token, sparse |"
    ]
    rows.append("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for rank in (None, *LOW_RANKS):
            ranks, memory = _fitting(model, rank)
            cost = _cost(model, ranks, rank=rank)
            rows.append(
                f"| {model.name} | {'full' if rank is None else f'rank {rank}'} | {cost.parameters / 1e9:.2f} G | "
                f"{_bytes(16 * cost.parameters)} | {ranks} | {_bytes(memory)} | {cost.sparse_flops / 1e9:,.2f} GFLOP |"
            )
    return "\n".join(rows)


def _cost(model: Model, ranks: int, parallel: str = "features", rank: int | None = None):
    from transcoders.training import CLTConfig, training_cost

    config = CLTConfig(
        features=model.features, batch=BATCH, tokens=TOKENS, activation="batchtopk", k=L0 * model.n_layers,
        parallel=parallel,  # pyright: ignore[reportArgumentType]
        decoder_rank=rank,
    )  # fmt: skip
    return training_cost(config, n_layers=model.n_layers, d_model=model.d_model, ranks=ranks, device="cuda")


def _fitting(model: Model, rank: int | None = None) -> tuple[int, float]:
    """As few GPUs as hold it, and the bytes on each."""
    ranks = 1
    while True:
        memory = _cost(model, ranks, rank=rank).memory + 4 * model.parameters + BUFFER_MB * 2**20
        if memory <= MEMORY_USED * MEMORY:
            return ranks, memory
        ranks *= 2


def _hours(model: Model, flops: float, update: float, ranks: int) -> float:
    """Of all GPUs together."""
    steps = TOKENS / BATCH
    compute = TOKENS * (flops + 2 * model.parameters) / (UTILISATION * PEAK)
    network = _cost(model, ranks).network / NETWORK
    return (compute + steps * ranks * (update / BANDWIDTH + network)) / 3600


def _bytes(n: float) -> str:
    return f"{n / 1e12:.2f} TB" if n >= 1e12 else f"{n / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} written\n")
