# pyright: reportMissingImports=false
"""Trains one SAE with one library, a few steps at a time, as its parent says. Run by `benchmarks/training.py`.

It runs in the library's own environment, so it imports nothing of ours but in our own. A line `steps n` on its input
is answered by the seconds those steps took, `fvu` by the fraction of variance unexplained on held-out data.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ANSWER = "@@"
"""Marks our lines of output among those that libraries print."""


class Data:
    """The same batches in the same order for everybody."""

    def __init__(self, path: str, batch: int, held_out: int, seed: int) -> None:
        vectors = torch.from_numpy(np.load(path, allow_pickle=False))
        self.training, self.held_out = vectors[:-held_out], vectors[-held_out:]
        self.batch, self.generator, self.order = batch, np.random.default_rng(seed), np.zeros(0, dtype=np.int64)

    def __iter__(self) -> "Data":
        return self

    def __next__(self) -> torch.Tensor:
        if len(self.order) < self.batch:
            self.order = self.generator.permutation(len(self.training))
        picked, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.training[torch.from_numpy(picked)]


class Ours:
    """The public trainer's step: `transcoders.training.Run`."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from transcoders import SAEConfig
        from transcoders.kernels import keep_freed_memory
        from transcoders.training.step import Run

        keep_freed_memory()  # as `circuitsae train` does
        config = SAEConfig(
            features=task["width"],
            k=task["k"],
            activation=task["kind"],
            batch=task["batch"],
            tokens=task["batch"] * task["steps"],
            lr=task["lr"],
            seed=task["seed"],
            k_start=4.0,
            warmup=0.0,  # a constant rate, as the peers have it
            decay=0.0,
            dead_after=10_000_000,  # as the peers: no latent is declared dead within a benchmark
        )
        sample = data.training[:8192].unsqueeze(1)
        self.run, self.n_steps = Run.start(config, sample, sample), 0

    def step(self, x: torch.Tensor) -> None:
        x = x.unsqueeze(1)
        self.run.step(self.n_steps, x, x, measure=False)
        self.n_steps += 1

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        weights, scale = self.run.weights, float(self.run.scales.read)
        reads = (x * scale).unsqueeze(0)
        return weights.reconstruct(weights.activate(weights.pre_activations(reads)), reads)[0] / scale


class Kernels:
    """The least that is a training step, made of the kernels alone: shows what the trainer's bookkeeping costs."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from transcoders import kernels

        kernels.keep_freed_memory()
        self.kernels, self.k = kernels, task["k"]
        encode = kernels.topk_encode if task["kind"] == "topk" else kernels.batch_topk_encode
        self.encode = encode
        torch.manual_seed(task["seed"])
        rows = torch.randn(1, task["width"], task["d"])
        rows /= rows.norm(dim=-1, keepdim=True)
        self.W_dec = rows.clone().requires_grad_()
        self.W_enc = rows.requires_grad_()
        self.b_enc = torch.zeros(1, task["width"], requires_grad=True)
        self.b_dec = data.training[:8192].mean(dim=0).requires_grad_()
        parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(parameters, lr=task["lr"], fused=True)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        centred = (x - self.b_dec.detach()).unsqueeze(0)
        found = self.encode(centred, self.W_enc.mT, self.b_enc, self.k)
        return self.kernels.decode(found.value.relu(), found.active, self.W_dec)[0] + self.b_dec

    def step(self, x: torch.Tensor) -> None:
        loss = (x - self.reconstruct(x)).square().mean() * x.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)


class SAELens:
    """`SAETrainer.step`, which its `fit` calls."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(task["seed"])
        of_kind = {
            "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
            "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        }
        sae_class, config_class = of_kind[task["kind"]]
        self.sae = sae_class(config_class(d_in=task["d"], d_sae=task["width"], k=task["k"]))
        config = SAETrainerConfig(
            total_training_samples=task["batch"] * task["steps"],
            train_batch_size_samples=task["batch"],
            lr=task["lr"],
            lr_end=task["lr"] / 10,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(cfg=config, sae=self.sae, data_provider=data)

    def step(self, x: torch.Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x)


class DictionaryLearning:
    """`trainer.update`, which its `trainSAE` calls."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[task["kind"]]
        self.trainer = trainer(
            steps=task["steps"], activation_dim=task["d"], dict_size=task["width"], k=task["k"],
            layer=0, lm_name="none", lr=task["lr"], warmup_steps=0, seed=task["seed"], device="cpu",
        )  # fmt: skip
        self.n_steps = 0

    def step(self, x: torch.Tensor) -> None:
        self.trainer.update(self.n_steps, x)
        self.n_steps += 1

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.trainer.ae.decode(self.trainer.ae.encode(x, use_threshold=False))


class Sparsify:
    """The inner lines of its trainer's loop, which reads a language model and cannot be given activations."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        if task["kind"] != "topk":
            raise NotImplementedError("sparsify has no BatchTopK")
        torch.manual_seed(task["seed"])
        self.sae = SparseCoder(task["d"], SparseCoderConfig(num_latents=task["width"], k=task["k"]))
        self.sae.b_dec.data = data.training[:8192].mean(dim=0)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=task["lr"])
        self.since_fired = torch.zeros(task["width"], dtype=torch.long)

    def step(self, x: torch.Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(x)
        self.since_fired[out.latent_indices.flatten()] = 0

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x).sae_out


LIBRARIES = {
    "circuitsae": Ours,
    "kernels": Kernels,
    "sae-lens": SAELens,
    "dictionary-learning": DictionaryLearning,
    "sparsify": Sparsify,
}


def seconds_of(trainer: Any, data: Data, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        trainer.step(next(data))
    return time.perf_counter() - start


def settle_threads(trainer: Any, data: Data, limit: int, n: int) -> int:
    """Everybody runs with the number of threads that suits it, found by a trial."""
    times: dict[int, float] = {}
    for _ in range(2):
        for threads in range(1, limit + 1):
            torch.set_num_threads(threads)
            times[threads] = min(times.get(threads, float("inf")), seconds_of(trainer, data, n))
    best = min(times, key=times.__getitem__)
    torch.set_num_threads(best)
    return best


def held_out_fvu(trainer: Any, data: Data) -> float:
    with torch.no_grad():
        x = data.held_out
        error = torch.cat([part - trainer.reconstruct(part) for part in x.split(1024)])
        return float(error.square().sum() / (x - x.mean(dim=0)).square().sum())


def answer(**values: Any) -> None:
    print(ANSWER + json.dumps(values), flush=True)


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    data = Data(task["data"], task["batch"], task["held_out"], task["seed"])
    try:
        trainer = LIBRARIES[task["library"]](task, data)
    except NotImplementedError as missing:
        answer(missing=str(missing))
        return
    seconds_of(trainer, data, 2)
    answer(threads=settle_threads(trainer, data, task["threads"], task["trial"]), torch=torch.__version__)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "steps":
            answer(seconds=seconds_of(trainer, data, int(arguments[0])))
        elif command == "fvu":
            answer(fvu=held_out_fvu(trainer, data))


if __name__ == "__main__":
    main()
