"""`TunedLens`: an affine translator of each state, after which the logit lens reads it; how it is fitted and kept.

Source: Belrose et al. 2023, *Eliciting Latent Predictions from Transformers with the Tuned Lens* (arXiv:2303.08112).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.lenses.reading import check_last, lens_logits, streams_of
from transcoders.data import open_corpus, take_rows
from transcoders.data.corpora import CorpusSource
from transcoders.errors import FileFormatError, InputError
from transcoders.files import new_file
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

FORMAT = "circuitsae tuned lens 1"
FIRST = 1
"""The first position that is fitted and judged: what stands before is an outlier in most models."""
_HELD_OUT = 10
"""Of rows of tokens that are given every tenth is held out."""
_LR = 3e-3


@dataclass(frozen=True)
class TunedLens:
    """`h ↦ h A_l + b_l` for the stream h before block l; after the last block nothing is to be translated."""

    A: Float[Tensor, "layer d_model d_model"]
    b: Float[Tensor, "layer d_model"]
    model: str
    fingerprint: str
    """Of the model's weights."""
    fitted: Mapping[str, Any] = field(default_factory=dict)
    """On what, and `plain` and `tuned`: by state the mean KL to the model on text held out, in nats."""

    def translate(
        self, streams: Float[Tensor, "state row d_model"], model: LanguageModel
    ) -> Float[Tensor, "state row d_model"]:
        """Every state as the last one would be. Raises `InputError` where the lens is another model's."""
        self.check_fits(model)
        A, b = self.A.to(streams), self.b.to(streams)
        return torch.cat([streams[:-1] @ A + b[:, None], streams[-1:]])

    def check_fits(self, model: LanguageModel) -> None:
        if self.fingerprint != model.fingerprint():
            raise InputError(
                f"The lens was fitted to {self.model} ({self.fingerprint}), not to {model.name} "
                f"({model.fingerprint()}); fit one to this model with `circuitsae fit-lens`."
            )

    def frame(self) -> pd.DataFrame:
        """Mean KL to the model on text held out, plain and tuned: a row per state (`layer` −1 before block 0)."""
        plain, tuned = (self.fitted.get(name, []) for name in ("plain", "tuned"))
        layers = range(-1, len(plain) - 1)
        return pd.DataFrame({"layer": list(layers), "plain": plain, "tuned": tuned})

    def save(self, path: str | Path) -> Path:
        """Write a `.safetensors` file; returns its path."""
        from safetensors.torch import save_file

        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise InputError(f"A lens is kept in a .safetensors file; {path.name!r} is none. Give it that suffix.")
        about = {"format": FORMAT, "model": self.model, "fingerprint": self.fingerprint}
        with new_file(path) as temporary:
            tensors = {"A": self.A.cpu().contiguous(), "b": self.b.cpu().contiguous()}
            save_file(tensors, temporary, metadata={**about, "fitted": json.dumps(dict(self.fitted))})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "TunedLens":
        """The lens in a file. Raises `FileFormatError` for a file that holds none."""
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise FileFormatError(f"{path} is no tuned lens; give a file that `circuitsae fit-lens` wrote.")
                A, b = file.get_tensor("A"), file.get_tensor("b")
            fitted = json.loads(about["fitted"])
            if A.ndim != 3 or A.shape[1] != A.shape[2] or b.shape != A.shape[:2] or not isinstance(fitted, dict):
                raise ValueError(f"its tensors have shapes {tuple(A.shape)} and {tuple(b.shape)}")
            return cls(A, b, about["model"], about["fingerprint"], fitted)
        except FileNotFoundError as error:
            raise InputError(f"There is no file {path}; `circuitsae fit-lens` writes a lens.") from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path} holds no tuned lens that can be read ({error}); fit it again.") from error


def fit_lens(
    model: LanguageModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    *,
    tokens: int = 100_000,
    held_out_tokens: int = 10_000,
    steps: int = 250,
    batch_tokens: int = 512,
    context: int = 128,
    separator: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TunedLens:
    """Translators that minimise `KL(model ‖ softmax(unembed(norm(h A_l + b_l))))` of every state on text.

    As in the paper the translators begin as the identity and are trained on the model's own outputs, here by Adam with
    a falling rate; least squares to the last state is closed and quicker, but leaves several times the KL on the pocket
    model's late states, because it spends itself on directions that the unembedding does not read. Positions from
    `FIRST` on are fitted and judged. Of rows of tokens every tenth is held out, of a corpus what `train` leaves out.

    Raises `InputError` where there is too little text.
    """
    for name, value in (("tokens", tokens), ("held_out_tokens", held_out_tokens), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise InputError(f"{name}={value} leaves nothing to fit or to judge; give at least 1.")
    if steps < 0:
        raise InputError(f"steps={steps} is no number of steps; give 0 or more.")
    rows, held_out, name = _rows(model, corpus, tokens, held_out_tokens, context, separator)
    logits, streams = streams_of(model, rows[:1])
    check_last(model, streams[-1, 0], logits[0])
    fit = _Fit(model, streams[:-1, :, FIRST:].double().pow(2).mean((1, 2, 3)).sqrt().to(model.dtype))
    generator, at_once = torch.Generator().manual_seed(seed), max(1, batch_tokens // rows.shape[1])
    optimizer = torch.optim.Adam(fit.parameters, lr=_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(1, steps))
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("fitting", total=steps)
        for _ in range(steps):
            some = rows[torch.randint(len(rows), (at_once,), generator=generator).to(rows.device)]
            optimizer.zero_grad()
            fit.loss(some).backward()
            optimizer.step()
            schedule.step()
            bar.advance(task)
    lens = TunedLens(*fit.translators(), model.name, model.fingerprint())
    plain, tuned = held_out_kl(model, lens, held_out, at_once)
    about = {"corpus": name, "tokens": rows.numel(), "steps": steps, "batch_tokens": batch_tokens, "seed": seed}
    about |= {"context": rows.shape[1], "held_out_tokens": held_out.numel(), "plain": plain, "tuned": tuned}
    return TunedLens(lens.A, lens.b, lens.model, lens.fingerprint, about)


def _rows(
    model: LanguageModel,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    tokens: int,
    held_out_tokens: int,
    context: int,
    separator: str | None,
) -> tuple[Int[Tensor, "_ pos"], Int[Tensor, "_ pos"], str]:
    """Rows to fit on, rows held out, and what the text is called."""
    if isinstance(corpus, Tensor):
        if corpus.ndim != 2 or len(corpus) < 2 or corpus.shape[1] <= FIRST:
            raise InputError(f"Rows of shape {tuple(corpus.shape)} leave nothing to hold out; give 2 of 2 tokens each.")
        held = torch.arange(len(corpus)) % _HELD_OUT == 1
        corpus, held = corpus.to(model.device), held.to(model.device)
        return corpus[~held], corpus[held], "rows of tokens"
    opened, context = open_corpus(corpus), min(context, model.context)
    if context <= FIRST:
        raise InputError(f"Rows of {context} token have none to fit after the first; give context of 2 or more.")
    how: dict[str, Any] = {"context": context, "separator": opened.separator_or(separator)}
    rows = take_rows(model, opened.training(None), rows=-(-tokens // context), **how)
    return rows, take_rows(model, opened.held_out(), rows=-(-held_out_tokens // context), **how), opened.name


class _Fit:
    """Translators in the making: `h + h D_l + σ_l β_l`, σ_l the size of the stream there, so that one rate fits all."""

    def __init__(self, model: LanguageModel, size: Float[Tensor, "layer"]) -> None:
        self.model, self.size = model, size
        width = model.d_model
        self.D = torch.zeros(len(size), width, width, dtype=size.dtype, device=size.device, requires_grad=True)
        self.beta = torch.zeros(len(size), width, dtype=size.dtype, device=size.device, requires_grad=True)
        self.parameters = [self.D, self.beta]

    def loss(self, rows: Int[Tensor, "row pos"]) -> Float[Tensor, ""]:
        """The mean KL of each state, summed over the states."""
        logits, streams = streams_of(self.model, rows)
        expected = logits[:, FIRST:].flatten(0, 1).log_softmax(-1)
        total = self.size.new_zeros(())
        for layer, stream in enumerate(streams[:-1, :, FIRST:].flatten(1, 2)):
            moved = stream + stream @ self.D[layer] + self.size[layer] * self.beta[layer]
            found = torch.cat(list(lens_logits(self.model, moved))).log_softmax(-1)
            total = total + (expected.exp() * (expected - found)).sum(-1).mean()
        return total

    def translators(self) -> tuple[Tensor, Tensor]:
        """A and b."""
        one = torch.eye(self.D.shape[-1], dtype=self.D.dtype, device=self.D.device)
        return (one + self.D).detach(), (self.size[:, None] * self.beta).detach()


@torch.no_grad()
def held_out_kl(
    model: LanguageModel, lens: TunedLens, rows: Int[Tensor, "row pos"], at_once: int
) -> tuple[list[float], list[float]]:
    """By state the mean KL(model ‖ lens) in nats, of the plain lens and of the tuned one."""
    sums, count = torch.zeros(2, model.n_layers + 1, dtype=torch.float64), 0
    for part in rows.split(at_once):
        logits, streams = streams_of(model, part)
        expected = logits[:, FIRST:].flatten(0, 1).double().log_softmax(-1)
        plain = streams[:, :, FIRST:].flatten(1, 2)
        for side, states in enumerate((plain, lens.translate(plain, model))):
            for layer, stream in enumerate(states):
                found = torch.cat(list(lens_logits(model, stream))).double().log_softmax(-1)
                sums[side, layer] += (expected.exp() * (expected - found)).sum().cpu()
        count += len(expected)
    plain, tuned = (sums / count).tolist()
    return plain, tuned
