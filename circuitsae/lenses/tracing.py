"""`causal_trace`: the subject of a prompt drowned in noise, and one state at a time put back.

Source: Meng, Bau, Andonian & Belinkov 2022, *Locating and Editing Factual Associations in GPT* (arXiv:2202.05262),
section 2 and appendix B.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.lenses.replacing import BATCH_TOKENS, Cell, StateKind, check_kind, replaced, run_of, windows_of
from circuitsae.lenses.sweep import Sweep
from circuitsae.report.text import visible
from circuitsae.tasks.wording import encode
from transcoders.errors import InputError
from transcoders.held import EMBED
from transcoders.language_model import LanguageModel


def causal_trace(
    model: LanguageModel,
    prompt: str | Int[Tensor, "pos"],
    subject: str | Sequence[int],
    *,
    answer: str | int | None = None,
    kind: StateKind = "resid_post",
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Sweep:
    """Where the answer is restored: `P[o | noise on the subject, h_{l,p} clean] − P[o | noise on the subject]`.

    The embeddings of the subject's tokens get Gaussian noise of standard deviation `noise` · σ, where σ is that of all
    numbers of the model's token embeddings (the paper takes those of a text). In that run one state at a time is put
    back to its clean value: the stream after block l at position p, or what the MLPs or attentions of a `window` of
    layers around l give there (the paper: 10 of GPT-2 XL's 48). The mean over `samples` of the noise is the average
    indirect effect, `Sweep.total` the total effect. Every cell sees the same noise.

    `subject`: a part of the prompt (its first occurrence), or positions. `answer`: the token whose probability is
    followed, by default the model's first choice. Raises `InputError` for a subject that is not in the prompt.
    """
    check_kind(kind, window, model.n_layers)
    if samples < 1 or not noise > 0:
        raise InputError(f"samples={samples}, noise={noise} is nothing to average; give 1 or more, and more than 0.")
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else model.check_tokens(prompt)
    where = subject_mask(model, prompt, tokens, subject)
    clean = run_of(model, tokens.repeat(samples, 1), kind)
    noisy = run_of(model, clean.tokens, kind, noisy_embeddings(model, tokens, where, noise, samples, seed))
    said = answer if isinstance(answer, int) else None if answer is None else model.token_id(answer)
    said = int(model.logits_of(clean.final[:1, -1]).argmax()) if said is None else said
    windows, each = windows_of(model.n_layers, window), torch.eye(len(tokens), dtype=torch.bool, device=model.device)
    cells = [Cell(layers, here.expand(samples, -1)) for layers in windows for here in each]
    runs = replaced(model, kind, noisy, clean, cells, batch_tokens)
    before, target = (_probability(model, run.final[None], said)[0] for run in (noisy, clean))
    effects = torch.cat([_probability(model, final, said) for final in runs]) - before
    return Sweep(
        effects.unflatten(0, (len(windows), len(tokens))).double().cpu().numpy(),
        before.double().cpu().numpy(),
        target.double().cpu().numpy(),
        tuple(windows),
        tuple(
            f"{pos} {visible(text)}" + "*" * bool(where[pos]) for pos, text in enumerate(model.token_strings(tokens))
        ),
        kind,
        f"P({visible(model.token_string(said))})",
        "restored under noise at *",
    )


def subject_mask(
    model: LanguageModel, prompt: str | Int[Tensor, "pos"], tokens: Int[Tensor, "pos"], subject: str | Sequence[int]
) -> Bool[Tensor, "pos"]:
    """The positions of a subject: those of the tokens that hold its characters."""
    where = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    if isinstance(subject, str):
        if not isinstance(prompt, str):
            raise InputError(f"The subject {subject!r} is a text, but the prompt is token ids; give positions.")
        start = prompt.find(subject) if subject else -1
        if start < 0:
            raise InputError(f"The subject {subject!r} is not in the prompt {prompt[:80]!r}; give a part of it.")
        (encoded,) = encode(model, [prompt])
        start += len(subject) - len(subject.lstrip())
        first, last = encoded.position(start), encoded.position(prompt.find(subject) + len(subject.rstrip()) - 1)
        subject = range(first, last + 1)
    chosen = list(subject)
    if not chosen or not all(-len(tokens) <= pos < len(tokens) for pos in chosen):
        raise InputError(f"The subject's positions {chosen} are not among the prompt's {len(tokens)}; name some of it.")
    where[chosen] = True
    return where


@torch.no_grad()
def noisy_embeddings(
    model: LanguageModel, tokens: Int[Tensor, "pos"], where: Bool[Tensor, "pos"], noise: float, samples: int, seed: int
) -> Float[Tensor, "sample pos d_model"]:
    """Embeddings of the prompt, noise added at some positions, drawn anew for each sample."""
    vocabulary = torch.arange(model.d_vocab, device=model.device)
    every, alone = (model.parts.embed(ids[None])[0] for ids in (vocabulary, tokens))
    _, cache = model.run_hooked(tokens[None], read=[EMBED])
    own = cache[EMBED][0]
    sigma = every.std() * own.norm() / alone.norm()  # some families scale embeddings outside of their table
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, *own.shape, generator=generator, dtype=torch.float64)
    return own + where[:, None] * (noise * sigma * drawn.to(own))


def _probability(
    model: LanguageModel, final: Float[Tensor, "cell sample pos _"], token: int
) -> Float[Tensor, "cell sample"]:
    """Of a token after the last position."""
    logits = model.logits_of(final[:, :, -1].flatten(0, 1))
    return logits.softmax(-1)[:, token].unflatten(0, final.shape[:2])
