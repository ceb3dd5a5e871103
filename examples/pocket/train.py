"""Training the pocket language model from scratch: seeded, on the CPU, and resumable to the bit.

A batch depends on `(seed, step)` alone and the model has no dropout, so weights, AdamW moments and the step are the
whole state of a run; a checkpoint holds them in one safetensors file, and a resumed run equals an unbroken one.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from circuitsae.pocket.corpus import PERIODIC, REPEATS, batch, batch_shape
from transcoders.formats.files import write_tensors
from transcoders.progress import progress_bar

logger = logging.getLogger(__name__)

_EMBEDDING_SCALE = 0.05
_LONGEST_WAVE = 1000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on besides the tokenizer."""

    seed: int = 0
    """Seed of the initial weights and of the corpus."""
    steps: int = 5400
    """Optimizer steps."""
    layers: int = 4
    """Transformer blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    heads: int = 8
    """Attention heads per block."""
    context: int = 512
    """Number of positions."""
    rows: int = 64
    """Rows of a batch; fewer where the rows are long."""
    row_length: int = 96
    """Tokens of a row, except in one batch of twelve, whose rows fill the context."""
    periodic_steps: int = 1000
    """Steps at the beginning whose batches are drawn from `corpus.PERIODIC`."""
    periodic_length: int = 40
    """Tokens of a row in those steps."""
    repeats_steps: int = 600
    """Steps after them whose batches are drawn from `corpus.REPEATS`."""
    repeats_length: int = 64
    """Tokens of a row in those steps."""
    learning_rate: float = 3e-3
    """Peak of the schedule."""
    warmup: int = 200
    """Steps of linear warm-up."""
    decay_from: int = 2100
    """Step at which the rate leaves its peak, falling linearly."""
    decay_to: int = 4200
    """Step at which that fall would reach zero, were it not for the tail."""
    tail_from: int = 3500
    """Step from which the rate falls more slowly, to reach zero at the last step."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    bfloat16: bool = True
    """Whether the forward pass runs under bfloat16 autocast; weights and moments stay float32."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""


def scaled(config: TrainConfig, steps: int) -> TrainConfig:
    """The same curriculum and schedule, compressed or stretched to another number of steps."""
    names = ("periodic_steps", "repeats_steps", "warmup", "decay_from", "decay_to", "tail_from")
    counts = {name: round(getattr(config, name) * steps / config.steps) for name in names}
    return replace(config, steps=steps, **counts)


def build_model(config: TrainConfig, vocab_size: int) -> GPT2LMHeadModel:
    """An untrained model whose weights come from an explicit generator.

    Matrices are N(0, 1 / d_model), output projections divided by sqrt(2 L), token embeddings N(0, 0.05^2), positions
    sinusoids. Every head starts as one that copies (output projection proportional to the transposed value projection)
    and, above the first layer, as one that looks for its like (queries half correlated with keys): at this size and
    number of tokens copying would not emerge from independent matrices. All of it is trained like the rest.
    """
    shape = GPT2Config(
        vocab_size=vocab_size,
        n_positions=config.context,
        n_embd=config.d_model,
        n_layer=config.layers,
        n_head=config.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(shape)
    _initialize(dict(model.named_parameters()), config)
    return model


@torch.no_grad()
def _initialize(weights: dict[str, nn.Parameter], config: TrainConfig) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    for name, weight in weights.items():
        if name.endswith("wpe.weight"):
            weight.copy_(_sinusoids(config.context, config.d_model))
        elif name.endswith("wte.weight"):
            weight.normal_(0.0, _EMBEDDING_SCALE, generator=generator)
        elif weight.ndim == 2:
            depth = 2 * config.layers if name.endswith("c_proj.weight") else 1
            weight.normal_(0.0, 1 / math.sqrt(config.d_model * depth), generator=generator)
    for layer in range(config.layers):
        attention = f"transformer.h.{layer}.attn"
        query, key, value = weights[f"{attention}.c_attn.weight"].split(config.d_model, dim=1)
        weights[f"{attention}.c_proj.weight"].copy_(value.T / math.sqrt(2 * config.layers))
        if layer > 0:
            query.copy_(0.5 * key + math.sqrt(0.75) * query)


def _sinusoids(context: int, d_model: int) -> Tensor:
    rates = _LONGEST_WAVE ** (-torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(context)[:, None] * rates
    return _EMBEDDING_SCALE * math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), -1)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, linear decay, and a slower linear tail."""
    up = (step + 1) / max(1, config.warmup)
    span = max(1, config.decay_to - config.decay_from)
    down = (config.decay_to - step) / span
    kink = (config.decay_to - config.tail_from) / span
    tail = kink * (config.steps - step) / max(1, config.steps - config.tail_from)
    return config.learning_rate * min(1.0, up, max(down, tail))


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def step_batch(tokenizer: Tokenizer, config: TrainConfig, step: int) -> Int[Tensor, "rows length"]:
    """The batch of a step: random words over and over first, then longer repeats, then the corpus."""
    if step < config.periodic_steps:
        return batch(tokenizer, config.seed, step, config.rows, config.periodic_length, PERIODIC)
    if step < config.periodic_steps + config.repeats_steps:
        return batch(tokenizer, config.seed, step, config.rows, config.repeats_length, REPEATS)
    rows, length = batch_shape(step, config.rows, config.row_length, config.context)
    return batch(tokenizer, config.seed, step, rows, length)


def train_step(
    model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, tokenizer: Tokenizer, config: TrainConfig, step: int
) -> float:
    """One step on the batch that belongs to it; returns the mean loss in nats per token."""
    tokens = step_batch(tokenizer, config, step)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        logits = model(tokens, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    return loss.item()


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: TrainConfig, step: int) -> None:
    """Weights and moments after `step` steps, in one file written beside its place and renamed."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    write_tensors(path, tensors, {"step": str(step), "config": json.dumps(asdict(config))})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: TrainConfig) -> int:
    """Restore weights and moments in place; returns the number of steps done."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        expected = json.dumps(asdict(config))
        if metadata["config"] != expected:
            raise ValueError(
                f"{path} belongs to another run: its config is {metadata['config']}, this one's {expected}. "
                "Give another --out, or remove the checkpoint."
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {
                    key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }
    return int(metadata["step"])


def train(
    config: TrainConfig,
    tokenizer: Tokenizer,
    checkpoint: Path,
    *,
    progress: bool = True,
    stop_at: int | None = None,
    on_checkpoint: Callable[[GPT2LMHeadModel, int], None] | None = None,
) -> GPT2LMHeadModel:
    """Train to the end, from `checkpoint` if that file is there, or stop (as if killed) after `stop_at` steps."""
    model = build_model(config, tokenizer.get_vocab_size())
    optimizer = _optimizer(model, config)
    start = load_checkpoint(checkpoint, model, optimizer, config) if checkpoint.exists() else 0
    if start:
        logger.info("resuming at step %d of %d", start, config.steps)
    model.train()
    end = min(config.steps, stop_at or config.steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bar(*columns, shown=progress, transient=False) as bar:
        task = bar.add_task("pocket model", total=config.steps, completed=start)
        for step in range(start, end):
            loss = train_step(model, optimizer, tokenizer, config, step)
            bar.update(task, advance=1, description=f"pocket model, loss {loss:.3f}")
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                logger.info("step %d of %d, loss %.3f", done, config.steps, loss)
                save_checkpoint(checkpoint, model, optimizer, config, done)
                if on_checkpoint is not None:
                    on_checkpoint(model, done)
    return model.eval()
