# pyright: reportMissingImports=false
"""How each library takes a training step, for `quality_worker.py`: the lines of its own loop around a batch of ours.

Everything that a task leaves open has the library's default. Warm-ups that are longer than a tenth of the run are cut
to a tenth: defaults are made for long runs, and the rate would not even reach its peak. Where no rate is given, it is
the library's default.
"""

from collections.abc import Callable
from typing import Any

import torch
from quality_batches import Batch, Data, Library, Reconstruction
from quality_clt import CLTForge, Oracle
from torch import Tensor


def short(default: int, task: dict[str, Any]) -> int:
    """Steps of a warm-up, at most a tenth of the run."""
    return min(default, task["steps"] // 10)


class Ours:
    """The public trainer's step: `transcoders.training.Run`, all settings at their defaults."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from transcoders import CLTConfig, SAEConfig, TranscoderConfig
        from transcoders.kernels import keep_freed_memory
        from transcoders.training.step import Run

        keep_freed_memory()  # as `circuitsae train` does
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "topk": (SAEConfig, {"activation": "topk"}),
            "batchtopk": (SAEConfig, {"activation": "batchtopk"}),
            "jumprelu": (SAEConfig, {"activation": "jumprelu"}),
            "gated": (SAEConfig, {"activation": "gated"}),
            "l1": (SAEConfig, {"activation": "relu"}),
            "transcoder": (TranscoderConfig, {"activation": "topk"}),
            "skip": (TranscoderConfig, {"activation": "topk", "skip": True}),
            "clt": (CLTConfig, {"activation": "jumprelu"}),
        }
        config_class, settings = kinds[task["kind"]]
        settings |= {"features": task["width"], "batch": task["batch"], "tokens": task["batch"] * task["steps"]}
        settings |= {"seed": task["seed"], "k": task["k"], **task["settings"]}
        if task["rate"] is not None:
            settings["lr"] = task["rate"]
        config = config_class(**settings)
        reads, writes = (_layered(side) for side in data.sample())
        self.config, self.rate = config, config.lr_used
        self.run, self.n_steps = Run.start(config, reads, writes), 0

    def step(self, batch: Batch) -> None:
        measure = (self.n_steps + 1) % self.config.log_every == 0  # as the trainer does
        self.run.step(self.n_steps, _layered(batch.reads), _layered(batch.writes), measure=measure)
        self.n_steps += 1

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        """As the features are chosen at the end of training: k is the last one."""
        weights, scales = self.run.weights, self.run.scales
        x = (_layered(reads).transpose(0, 1) * scales.read[:, None, None]).contiguous()
        own = {name: p.detach().clone() for name, p in weights.named_parameters() if name in self.run.averaged}
        k = getattr(weights.activation, "k", None)
        for name, p in weights.named_parameters():
            p.copy_(self.run.averaged.get(name, p))
        if k is not None:
            weights.activation.k = self.config.k  # pyright: ignore[reportAttributeAccessIssue]
        a = weights.activate(weights.pre_activations(x))
        writes = weights.reconstruct(a, x) / scales.write[:, None, None]
        for name, p in weights.named_parameters():
            p.copy_(own.get(name, p))
        if k is not None:
            weights.activation.k = k  # pyright: ignore[reportAttributeAccessIssue]
        return Reconstruction(writes.transpose(0, 1).reshape(reads.shape), int((a > 0).sum()))


def _layered(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 2 else x


class SAELens:
    """`SAETrainer.step`, which its `fit` calls."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, standard_sae, topk_sae
        from sae_lens.training.sae_trainer import SAETrainer

        k, strength = {"k": task["k"]}, task["settings"].get("coefficient", 1.0)
        sae_class, config_class, settings = {
            "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig, k),
            "batchtopk": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig, k),
            "jumprelu": (
                jumprelu_sae.JumpReLUTrainingSAE,
                jumprelu_sae.JumpReLUTrainingSAEConfig,
                {"l0_coefficient": strength},
            ),
            "gated": (gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig, {"l1_coefficient": strength}),
            "l1": (
                standard_sae.StandardTrainingSAE,
                standard_sae.StandardTrainingSAEConfig,
                {"l1_coefficient": strength},
            ),
        }[task["kind"]]
        self.sae = sae_class(config_class(d_in=task["d"], d_sae=task["width"], **settings))
        self.rate = task["rate"] or SAETrainerConfig.lr
        config = SAETrainerConfig(
            total_training_samples=task["batch"] * task["steps"],
            train_batch_size_samples=task["batch"],
            lr=self.rate,
            lr_end=self.rate / 10,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(cfg=config, sae=self.sae, data_provider=iter(()))

    def step(self, batch: Batch) -> None:
        self.trainer.step(batch.reads)
        self.trainer.n_training_steps += 1

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        a = self.sae.encode(reads)
        return Reconstruction(self.sae.decode(a), int((a > 0).sum()))


class DictionaryLearning:
    """`trainer.update`, which its `trainSAE` calls."""

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.gdm import GatedSAETrainer
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer
        from dictionary_learning.trainers.standard import StandardTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        sparsity_warmup = {"sparsity_warmup_steps": short(2000, task)}
        penalty = {"l1_penalty": task["settings"].get("coefficient", 0.1)}
        trainer, settings = {
            "topk": (TopKTrainer, {"k": task["k"]}),
            "batchtopk": (BatchTopKTrainer, {"k": task["k"]}),
            "jumprelu": (JumpReluTrainer, {"target_l0": task["k"], **sparsity_warmup}),
            "gated": (GatedSAETrainer, penalty | sparsity_warmup),
            "l1": (StandardTrainer, penalty | sparsity_warmup),
        }[task["kind"]]
        given = {} if task["rate"] is None else {"lr": task["rate"]}
        self.trainer: Any = trainer(
            steps=task["steps"], activation_dim=task["d"], dict_size=task["width"], layer=0, lm_name="none",
            warmup_steps=short(1000, task), seed=task["seed"], device="cpu", **settings, **given,
        )  # fmt: skip
        self.rate, self.n_steps = self.trainer.lr, 0
        self.ranked = {"use_threshold": False} if task["kind"] in ("topk", "batchtopk") else {}

    def step(self, batch: Batch) -> None:
        self.trainer.update(self.n_steps, batch.reads)
        self.n_steps += 1

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        a = self.trainer.ae.encode(reads, **self.ranked)
        return Reconstruction(self.trainer.ae.decode(a), int((a > 0).sum()))


class Sparsify:
    """The inner lines of its trainer's loop, which reads a language model and cannot be given activations.

    Its default optimiser is `signum`, sign descent under a schedule-free average; `adam` is the other one.
    """

    def __init__(self, task: dict[str, Any], data: Data, *, adam: bool = False) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from transformers import get_linear_schedule_with_warmup

        self.transcode = task["kind"] != "topk"
        config = SparseCoderConfig(
            num_latents=task["width"], k=task["k"], transcode=self.transcode, skip_connection=task["kind"] == "skip"
        )
        device = task.get("device", "cpu")
        self.sae = SparseCoder(task["d"], config, dtype=torch.float32, device=device)
        wide = (task["width"] / 2**14) ** 0.5
        self.rate = task["rate"] or (2e-4 if adam else 5e-3) / wide
        self.n_steps, self.schedule = 0, None
        if adam:
            self.optimizer: Any = torch.optim.Adam(self.sae.parameters(), lr=self.rate)
            self.schedule = get_linear_schedule_with_warmup(self.optimizer, short(1000, task), task["steps"])
        else:
            self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=self.rate), momentum=0.95)
            self.optimizer.train()
        self.since_fired = torch.zeros(task["width"], dtype=torch.long, device=device)
        self.adam = adam

    def step(self, batch: Batch) -> None:
        if self.n_steps == 0:
            if self.transcode:
                self.sae.encoder.bias.data = -batch.reads.mean(0) @ self.sae.encoder.weight.data.T
            self.sae.b_dec.data = batch.writes.mean(0)
        if not self.transcode:
            self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=batch.reads, y=batch.writes)
        out.fvu.backward()
        if not self.transcode:
            self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self.since_fired += len(batch.reads)
        self.since_fired[out.latent_indices.flatten()] = 0
        self.n_steps += 1

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        """With the averaged weights, where there are any: so it writes its checkpoints."""
        if not self.adam:
            self.optimizer.eval()
        out = self.sae(reads)
        if not self.adam:
            self.optimizer.train()
        return Reconstruction(out.sae_out, int((out.latent_acts > 0).sum()))


def sparsify_adam(task: dict[str, Any], data: Data) -> Sparsify:
    return Sparsify(task, data, adam=True)


LIBRARIES: dict[str, Callable[[dict[str, Any], Data], Library]] = {
    "circuitsae": Ours,
    "sae-lens": SAELens,
    "dictionary-learning": DictionaryLearning,
    "sparsify": Sparsify,
    "sparsify-adam": sparsify_adam,
    "clt-forge": CLTForge,
    "oracle": Oracle,
}
