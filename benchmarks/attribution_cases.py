"""The cases of `attribution.py`: random models and dictionaries of known activity, and the operations they need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders import load_model, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, random_dictionaries
from transcoders.sites import Site

Kind = Literal["plt", "skip", "clt"]
BOS = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its dictionaries and one prompt; by default GPT-2 small's sizes and the reference prompt."""

    kind: Kind = "plt"
    """plt: a transcoder for each MLP; skip: with a skip term; clt: a cross-layer transcoder."""
    tokens: int = 20
    features: int = 4096
    """Of each layer."""
    active: int = 16
    """Active features of a layer and position, on average."""
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    d_vocab: int = 50257
    float64: bool = False
    seed: int = 0

    @property
    def label(self) -> str:
        precision = ", float64" if self.float64 else ""
        return f"{self.n_layers} × {self.d_model}, {self.features:,} features, {self.tokens} tokens{precision}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.float64 else torch.float32


def small(**changes: Any) -> Case:
    """The pocket model's sizes."""
    sizes: dict[str, Any] = {"n_layers": 4, "d_model": 128, "n_heads": 8, "d_vocab": 2176, "features": 1024}
    return Case(**{**sizes, **changes})


@dataclass(frozen=True)
class Prepared:
    """A case on disk, where every tool can read it."""

    case: Case
    model: Path
    """Hugging Face layout."""
    dictionaries: Path
    """circuit-tracer's format, which we read too."""
    tokens: list[int]
    index: Int[Tensor, "n 3"]
    """Layer, position and number of each active feature."""


def prepare(case: Case, folder: Path) -> Prepared:
    """Write a case's model and dictionaries; encoder biases are set so that `active` features fire on its prompt."""
    generator = torch.Generator().manual_seed(case.seed)
    random_tokens = torch.randint(1, case.d_vocab, (case.tokens - 1,), generator=generator).tolist()
    tokens = torch.tensor([BOS, *random_tokens])
    _save_model(case, folder / "model", generator)
    model = load_model(folder / "model", dtype=torch.float64)
    sites = [Site(layer, "mlp_in") for layer in range(case.n_layers)]
    found = model.activations(tokens[None], sites)
    reads = torch.stack([found[site][0] for site in sites]).to(case.dtype)
    del model, found
    index = _save_dictionaries(case, reads, folder / "dictionaries")
    return Prepared(case, folder / "model", folder / "dictionaries", tokens.tolist(), index)


def _save_model(case: Case, folder: Path, generator: torch.Generator) -> None:
    """A random GPT-2: weights of scale 1/√fan-in; norms and biases random too, so that none can hide."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=case.n_layers, n_embd=case.d_model, n_head=case.n_heads, vocab_size=case.d_vocab,
        n_positions=max(case.tokens, 64), bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise / (parameter.shape[1] if "wte" in name or "wpe" in name else len(noise)) ** 0.5)
    model.save_pretrained(folder)


def _save_dictionaries(case: Case, reads: Float[Tensor, "layer pos d_model"], folder: Path) -> Int[Tensor, "n 3"]:
    dictionaries = random_dictionaries(
        "clt" if case.kind == "clt" else "plt",
        n_layers=case.n_layers, d_model=case.d_model, features=case.features, skip=case.kind == "skip", seed=case.seed,
    )  # fmt: skip
    wanted, index = case.active * (case.tokens - 1), []
    with torch.no_grad():
        for layer in range(case.n_layers):
            h = dictionaries.pre_activations(layer, reads[layer, 1:].float())
            largest = h.flatten().topk(wanted + 1).values
            threshold = largest[-2:].mean()
            if isinstance(dictionaries, CrossLayerTranscoder):
                dictionaries.b_enc[layer] -= threshold
            else:
                dictionaries[layer].b_enc -= threshold
            where = (h > threshold).nonzero()
            where[:, 0] += 1
            index.append(torch.nn.functional.pad(where, (1, 0), value=layer))
    save_dictionaries(dictionaries, folder, format="circuit-tracer")
    return torch.cat(index)


def counted_operations(prepared: Prepared, n_logits: int) -> dict[str, float]:
    """Floating-point operations of the textbook algorithm (mathematics.md, "How to compute it fast"), by part.

    Hops of a target at layer l, position p: through the attention of its own layer from one position (4 d²), through
    those of the l layers below at p + 1 positions (4 (p+1) d² each), and through their skip terms (2 (p+1) d²).
    Scores: one product (2 d) for each target, source within its reach and layer which that source writes to.
    """
    case, d = prepared.case, prepared.case.d_model
    layer, pos, _ = prepared.index.unbind(1)
    logits = torch.full((n_logits,), case.n_layers), torch.full((n_logits,), case.tokens - 1)
    below = torch.cat([layer, logits[0] - 1]).double()  # full attention hops under the first one
    reach = torch.cat([pos, logits[1]]).double() + 1
    skips = torch.cat([layer, logits[0]]) * reach * 2 * d * d if case.kind == "skip" else torch.zeros(1)
    writers = torch.zeros(case.n_layers, case.tokens).index_put_((layer, pos), torch.ones(len(layer)), accumulate=True)
    writers = (writers.cumsum(1) if case.kind != "clt" else writers.cumsum(1).cumsum(0)) + torch.arange(
        1, case.tokens + 1
    )  # and one error node at each position
    within = torch.nn.functional.pad(writers.cumsum(0), (0, 0, 1, 0)).double()  # written below layer l, up to p
    target_layer, target_pos = torch.cat([layer, logits[0]]), torch.cat([pos, logits[1]])
    forward = case.tokens * (2 * case.n_layers * (12 * d * d + d * case.features) + 2 * d * case.d_vocab)
    return {
        "first hops": float(4 * d * d * len(below)),
        "hops": float((4 * d * d * below * reach).sum() + skips.sum()),
        "scores": float(2 * d * (within[target_layer, target_pos] + reach).sum()),
        "forward": float(forward),
    }
