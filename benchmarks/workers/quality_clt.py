# pyright: reportMissingImports=false
"""Cross-layer transcoders for `quality_worker.py`: CLT-Forge, and a plain dense training of our own loss."""

from typing import Any

import torch
from quality_batches import Batch, Data, Reconstruction
from torch import Tensor


class CLTForge:
    """`CLTTrainer._compute_training_step_loss`, which its `fit` calls, on activations scaled as its store does.

    Its first `b_enc` makes 10,000 features of a layer active; where a layer has not twice as many, it fails, and the
    biases stay zero.
    """

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from clt_forge.clt import CLT
        from clt_forge.config import CLTConfig, CLTTrainingRunnerConfig
        from clt_forge.training.clt_trainer import CLTTrainer

        short = min(1000, task["steps"] // 10)
        given = {} if task["rate"] is None else {"lr": task["rate"]}
        config = CLTTrainingRunnerConfig(
            device=task.get("device", "cpu"), distributed_setup="None", log_to_wandb=False, logger_verbose=False,
            n_checkpoints=0, seed=task["seed"], d_in=task["d"], d_latent=task["width"],
            train_batch_size_tokens=task["batch"],
            total_training_tokens=task["batch"] * task["steps"], lr_warm_up_steps=short, lr_decay_steps=short,
            l0_warm_up_steps=short, l0_coefficient=task["settings"].get("coefficient", 1e-3), **given,
        )  # fmt: skip
        sample = data.sample()
        self.scales = [task["d"] ** 0.5 / side.norm(dim=-1).mean(dim=0)[:, None] for side in sample]
        self.clt = CLT(config.create_sub_config(CLTConfig, n_layers=sample.reads.shape[1])).to(sample.reads.device)
        self.trainer = CLTTrainer(self.clt, None, config, lambda **_: None)
        self.rate = config.lr
        if task["width"] >= 20_000:
            hidden = torch.einsum("bnd,ndk->bnk", sample.reads * self.scales[0], self.clt.W_enc.detach())
            self.clt._initialize_b_enc(hidden)

    def step(self, batch: Batch) -> None:
        self.trainer._compute_training_step_loss(batch.reads * self.scales[0], batch.writes * self.scales[1])
        self.trainer.n_training_steps += 1

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        a, _ = self.clt.encode(reads * self.scales[0])
        return Reconstruction(self.clt.decode(a) / self.scales[1], int((a > 0).sum()))


class Jump(torch.autograd.Function):
    """`h · 1[h > θ]` with the straight-through gradient of Rajamanoharan et al. 2024, eq. 11."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(h > threshold, h, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        h, threshold = ctx.saved_tensors
        near = ((h - threshold).abs() < ctx.bandwidth / 2).float()
        return gradient * (h > threshold), -(gradient * near).sum(0) * threshold / ctx.bandwidth, None


class Oracle:
    """The loss and the schedule that circuitsae documents for a JumpReLU CLT, written plainly: dense, float32.

    First weights are circuitsae's own, so that its rows differ from these by the way of computing alone. The weight of
    the penalty is given; dead features are left alone.
    """

    def __init__(self, task: dict[str, Any], data: Data) -> None:
        from transcoders import CLTConfig
        from transcoders.training.initialise import initial_parameters, measure_scales

        settings = {} if task["rate"] is None else {"lr": task["rate"]}
        self.config = config = CLTConfig(
            features=task["width"], activation="jumprelu", batch=task["batch"], tokens=task["batch"] * task["steps"],
            seed=task["seed"], **settings, **task["settings"],
        )  # fmt: skip
        sample = data.sample()
        scales = measure_scales(*sample, config)
        self.read, self.write = scales.read[:, None], scales.write[:, None]
        first = initial_parameters(config, sample.reads * self.read, sample.writes * self.write)
        self.rate, self.n_steps, self.steps = config.lr_used, 0, config.steps
        self.W_enc, self.b_enc, self.b_dec = (p.detach().clone() for p in (first.W_enc, first.b_enc, first.b_dec))
        self.W_dec = [p.detach().clone() for p in first.W_dec]
        self.threshold = torch.full_like(self.b_enc, config.threshold)
        self.plain = [self.W_enc, self.b_enc, self.b_dec, *self.W_dec]
        for p in (*self.plain, self.threshold):
            p.requires_grad_()
        groups = [{"params": self.plain}, {"params": [self.threshold]}]
        self.optimizer = torch.optim.Adam(groups, lr=self.rate, betas=config.betas)

    def features(self, reads: Tensor) -> Tensor:
        h = torch.einsum("bld,lfd->blf", reads * self.read, self.W_enc) + self.b_enc
        return Jump.apply(h, self.threshold, self.config.bandwidth)  # pyright: ignore[reportReturnType]

    def decode(self, a: Tensor) -> Tensor:
        writes = [self.b_dec[layer].expand(len(a), -1) for layer in range(a.shape[1])]
        for source, W_dec in enumerate(self.W_dec):
            for offset in range(W_dec.shape[1]):
                writes[source + offset] = writes[source + offset] + a[:, source] @ W_dec[:, offset]
        return torch.stack(writes, dim=1)

    def step(self, batch: Batch) -> None:
        config, step, a = self.config, self.n_steps, self.features(batch.reads)
        error = batch.writes * self.write - self.decode(a)
        norms = torch.stack([W_dec.flatten(1).norm(dim=1) for W_dec in self.W_dec])
        penalty = torch.tanh(config.tanh_scale * a * norms / a.new_tensor(self.b_dec.shape[1]).sqrt())
        weight = config.sparsity * min(1.0, (step + 1) / max(1, round(config.sparsity_warmup * self.steps)))
        loss = error.square().mean() + weight * penalty.sum(dim=2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_([*self.plain, self.threshold], config.clip)
        up = (step + 1) / max(1, round(config.warmup * self.steps))
        down = (self.steps - step) / max(1, round(config.decay * self.steps))
        for group, factor in zip(self.optimizer.param_groups, (1.0, config.threshold_rate or 1.0), strict=True):
            group["lr"] = factor * self.rate * min(1.0, up, down)
        self.optimizer.step()
        with torch.no_grad():
            self.threshold.clamp_(min=0)
        self.n_steps += 1

    def reconstruct(self, reads: Tensor) -> Reconstruction:
        a = self.features(reads)
        return Reconstruction(self.decode(a) / self.write, int((a > 0).sum()))
