"""Where attention went: the score of one head between two positions, split by what wrote its query and its key.

Before the softmax, a head's score is bilinear in what it reads at two positions once the scales of the norms are held,

    score = Σ_ij q_i M k_jᵀ + constant,    q_i = norm(x_i) W_Q,    k_j = norm(y_j) W_K

with the streams `x = Σ_i x_i` and `y = Σ_j y_j`, with b_Q and b_K among the q and k, and M `[d_head, d_head]` what the
model does with them: rotary positions, norms of queries and keys, the factor 1/√d_head. M is the mixed derivative of
the score that the model's own module gives, so no family needs code of its own. The constant is what a score has
whatever is read (ALiBi). After Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; over features
as in Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions".
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.attention_sources import Namer, Nodes, Prompt, Source, SourceKind, Writers
from circuitsae.graph import NodeKind
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError, ModelError
from transcoders.model_parts import AttentionPart, Call

_AT_ONCE = 2**22
"""So many pairs of sources are held at once to find the largest."""


@dataclass(frozen=True)
class AttentionReasons:
    """Why a head looks from one position to another: its score over pairs of sources, `score = Σ c + constant`.

    `c[i, j] = queries[i] · keys[j]`; `contrast` gives the same of a difference of two scores.
    """

    layer: int
    head: int
    query: int
    key: int
    score: float
    """Before softmax and soft cap, as the model computes it."""
    pattern: float
    """After the softmax; of a contrast, the difference."""
    constant: float
    """What the score has whatever is read."""
    query_sources: tuple[Source, ...]
    key_sources: tuple[Source, ...]
    queries: Float[Tensor, "query_source d_head"]
    keys: Float[Tensor, "key_source d_head"]
    """As queries read them: `k_j Mᵀ`."""
    other: int | None = None
    """Of a contrast, the key whose score is subtracted."""
    _look: Callable[[int], "AttentionReasons"] | None = field(default=None, repr=False, compare=False)

    def matrix(self) -> Float[Tensor, "query_source key_source"]:
        """c, the contribution of every pair."""
        return self.queries @ self.keys.T

    def contributions(self, top: int = 1000) -> pd.DataFrame:
        """The pairs of largest size first: `query`, `query_text`, `key`, `key_text`, `contribution`."""
        value, row, column = self._largest(top)
        queries, keys = [self.query_sources[i] for i in row], [self.key_sources[j] for j in column]
        return pd.DataFrame(
            {
                "query": [s.id for s in queries], "query_text": [s.text for s in queries], "key": [s.id for s in keys],
                "key_text": [s.text for s in keys], "contribution": value,
            }
        )  # fmt: skip

    def _largest(self, top: int) -> tuple[list[float], list[int], list[int]]:
        """Values, query sources and key sources, without the matrix of all where it is large."""
        width, kept = len(self.keys), (self.queries.new_zeros(0), torch.zeros(0, dtype=torch.long))
        rows = max(1, _AT_ONCE // max(1, width))
        for start in range(0, len(self.queries), rows):
            flat = (self.queries[start : start + rows] @ self.keys.T).flatten()
            number = torch.arange(len(flat), device=flat.device) + start * width
            value, number = torch.cat([kept[0], flat]), torch.cat([kept[1].to(number), number])
            best = value.abs().argsort(descending=True, stable=True)[:top]
            kept = value[best], number[best]
        return kept[0].tolist(), (kept[1] // width).tolist(), (kept[1] % width).tolist()

    def by_query(self) -> pd.DataFrame:
        """What each source of the query gives with all of the key: `source`, `pos`, `text`, `contribution`."""
        return _marginal(self.query_sources, self.queries @ self.keys.sum(0))

    def by_key(self) -> pd.DataFrame:
        """What each source of the key gives with all of the query: `source`, `pos`, `text`, `contribution`."""
        return _marginal(self.key_sources, self.keys @ self.queries.sum(0))

    def by_kind(self) -> pd.DataFrame:
        """What each kind of source gives with each: rows of the query, columns of the key (feature, token, bias, …)."""
        (rows, q), (columns, k) = _per_kind(self.query_sources, self.queries), _per_kind(self.key_sources, self.keys)
        return pd.DataFrame(
            (q @ k.T).tolist(), index=pd.Index(rows, name="query"), columns=pd.Index(columns, name="key")
        )

    def contrast(self, other_key: int) -> "AttentionReasons":
        """Why this key and not another: the score less that of `other_key` at the same query.

        The softmax sees differences alone: what both keys have in common moves no attention between them. A source that
        is in both keys has the difference of its two parts.
        Raises `InputError` as `explain_attention` does, and for a contrast of a contrast.
        """
        if self._look is None:
            raise InputError("These reasons are of a contrast already; ask those of one key for another contrast.")
        other = self._look(other_key)
        sources = tuple(dict.fromkeys(self.key_sources + other.key_sources))
        number = {source: i for i, source in enumerate(sources)}
        keys = self.keys.new_zeros(len(sources), self.keys.shape[1])
        keys[[number[source] for source in self.key_sources]] += self.keys
        keys[[number[source] for source in other.key_sources]] -= other.keys
        return replace(
            self,
            score=self.score - other.score,
            pattern=self.pattern - other.pattern,
            constant=self.constant - other.constant,
            key_sources=sources,
            keys=keys,
            other=other.key,
            _look=None,
        )


def _per_kind(
    sources: tuple[Source, ...], vectors: Float[Tensor, "source d_head"]
) -> tuple[list[str], Float[Tensor, "kind d_head"]]:
    """The kinds that there are, and their sums."""
    kinds = sorted({str(source.kind) for source in sources})
    number = torch.tensor([kinds.index(source.kind) for source in sources], device=vectors.device)
    return kinds, vectors.new_zeros(len(kinds), vectors.shape[1]).index_add_(0, number, vectors)


def _marginal(sources: tuple[Source, ...], value: Float[Tensor, "source"]) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "source": [s.id for s in sources], "pos": [s.pos for s in sources], "text": [s.text for s in sources],
            "contribution": value.tolist(),
        }
    )  # fmt: skip
    return frame.sort_values("contribution", key=abs, ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def explain_attention(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"] | Trace,
    layer: int,
    head: int,
    query: int,
    key: int,
    *,
    sources: SourceKind = "nodes",
    names: Namer | None = None,
) -> AttentionReasons:
    """Why head `layer.head` looks from position `query` to position `key` of a prompt, over pairs of sources.

    Positions may count from the end (-1: the last).

    * `sources`: `nodes`, those of the graph, wherever they write: what earlier heads and skip terms moved is followed
      back with patterns held. `writers`: what writes at the two positions themselves, each earlier head one source.
    * `names`: of features, by layer and number, such as `FeatureCards.name`.

    Raises `InputError` for a head or a position that is not there, a key after the query or outside of the head's
    window, and `ModelError` where the parts do not give the model's own score.
    """
    if sources not in get_args(SourceKind):
        raise InputError(f"Unknown sources {sources!r}; give {' or '.join(map(repr, get_args(SourceKind)))}.")
    trace = prompt if isinstance(prompt, Trace) else model.trace(prompt)
    n_layers, n_heads = model.model.n_layers, len(_pattern(trace, 0))
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise InputError(
            f"{model.model.name} has no head {layer}.{head}; it has layers 0 to {n_layers - 1} with heads "
            f"0 to {n_heads - 1}."
        )
    return _Head(Prompt(model, trace, layer, names), head, sources).look(query, key)


def looking_heads(
    model: ReplacementModel, prompt: str | Int[Tensor, "pos"] | Trace, query: int, key: int
) -> pd.DataFrame:
    """Which heads look from position `query` to position `key`: `layer`, `head`, `pattern`, the largest first.

    Raises `InputError` for positions that are not there, and a key after the query.
    """
    trace = prompt if isinstance(prompt, Trace) else model.trace(prompt)
    query, key = _pair(trace, query, key)
    frame = pd.DataFrame(
        [
            (layer, head, value)
            for layer in range(model.model.n_layers)
            for head, value in enumerate(_pattern(trace, layer)[:, query, key].tolist())
        ],
        columns=["layer", "head", "pattern"],
    )
    return frame.sort_values("pattern", ascending=False, kind="stable", ignore_index=True)


def _pattern(trace: Trace, layer: int) -> Float[Tensor, "head query key"]:
    return trace.frozen.constants[f"blocks.{layer}.attn.hook_pattern"][0]


def _pair(trace: Trace, query: int, key: int) -> tuple[int, int]:
    """Positions counted from the start, the key not after the query."""
    count = trace.n_positions
    for what, pos in (("query", query), ("key", key)):
        if not -count <= pos < count:
            raise InputError(f"There is no {what} position {pos}; the prompt has positions 0 to {count - 1}.")
    query, key = query % count, key % count
    if key > query:
        raise InputError(f"Position {query} cannot look to {key}, which comes after it; give a key up to {query}.")
    return query, key


class _Head:
    """One head on one prompt."""

    def __init__(self, prompt: Prompt, head: int, kind: SourceKind) -> None:
        self.prompt, self.trace, self.layer, self.head = prompt, prompt.trace, prompt.layer, head
        self.sources = Nodes(prompt) if kind == "nodes" else Writers(prompt)
        model, constants = self.trace.frozen.model, self.trace.frozen.constants
        self.part: AttentionPart = model.parts.blocks[self.layer].attention
        self.call = _call(self.trace, self.layer)
        prefix, suffix = f"blocks.{self.layer}.attn.", ".hook_scale"
        self.scales = {
            name.removeprefix(prefix).removesuffix(suffix): value
            for name, value in constants.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }
        """Of the norms of queries and keys."""
        bias = 0 if prompt.norm.bias is None else prompt.norm.bias
        normed = (prompt.norm.forward(prompt.stream[None]) + bias).to(model.dtype)
        self.scores = self.part.scores(self.call, normed, self.scales)[0, head]
        """The model's own."""
        self.pattern = _pattern(self.trace, self.layer)[head]

    def look(self, query: int, key: int) -> AttentionReasons:
        query, key = _pair(self.trace, query, key)
        own = float(self.scores[query, key])
        if own < torch.finfo(self.scores.dtype).min / 2:
            raise InputError(f"Head {self.layer}.{self.head} does not see {key} from {query}: its window ends.")
        query_sources, q = self._factors("Q", query)
        key_sources, k = self._factors("K", key)
        M, constant = self._bilinear(query, key)
        keys = k @ M.to(k).T
        score = float(q.sum(0) @ keys.sum(0)) + constant
        self._check(score, own, float(q.sum(0).norm() * keys.sum(0).norm()) + abs(constant))
        return AttentionReasons(
            layer=self.layer, head=self.head, query=query, key=key, score=score,
            pattern=float(self.pattern[query, key]), constant=constant, query_sources=query_sources,
            key_sources=key_sources, queries=q, keys=keys, _look=torch.no_grad()(lambda other: self.look(query, other)),
        )  # fmt: skip

    def _check(self, score: float, own: float, size: float) -> None:
        """Raises `ModelError` where the sum is not the model's own score, by more than rounding (or float32 inside)."""
        if not abs(score - own) <= max(torch.finfo(self.trace.frozen.model.dtype).eps ** 0.5, 1e-5) * size:
            raise ModelError(
                f"The score of head {self.layer}.{self.head} of {self.trace.frozen.model.name} is {own:.4g}, but its "
                f"parts give {score:.4g}; how its attention is computed is not supported."
            )

    def _factors(self, kind: str, pos: int) -> tuple[tuple[Source, ...], Float[Tensor, "source d_head"]]:
        """What writes the query (kind Q) or the key (K) at a position, and what each source gives to it."""
        W, b = self._weights(kind)
        sources, factors = self.sources.at(pos, W)
        if (norm_bias := self.prompt.norm.bias) is not None:
            factors = torch.cat([factors, (norm_bias @ W.to(norm_bias))[None].to(factors)])
            sources.append(Source(f"{self.layer}.ln1.b", -1, NodeKind.BIAS))
        if b is not None:
            factors = torch.cat([factors, b.to(factors)[None]])
            sources.append(Source(f"{self.layer}.b_{kind}", -1, NodeKind.BIAS))
        return tuple(sources), factors

    def _weights(self, kind: str) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head"] | None]:
        W, b = self.part.weight(kind), self.part.bias(kind)
        number = self._number(len(W))
        return W[number], None if b is None else b.reshape(len(W), -1)[number]

    def _number(self, count: int) -> int:
        """Of the head among `count` that it may share with others."""
        return self.head * count // len(self.part.weight("Q"))

    @torch.enable_grad()
    def _bilinear(self, query: int, key: int) -> tuple[Float[Tensor, "d_head d_head"], float]:
        """M and the constant: ∂²score / ∂q ∂k and the score of nothing, from the model's own attention."""
        W_Q, W_K, count = self.part.weight("Q"), self.part.weight("K"), self.trace.n_positions
        q, k = (W_Q.new_zeros(W_Q.shape[2], requires_grad=True) for _ in "qk")
        placed = {
            "q": _placed(q, count, len(W_Q), query, self.head),
            "k": _placed(k, count, len(W_K), key, self._number(len(W_K))),
        }
        nothing = W_Q.new_zeros(1, count, W_Q.shape[1])
        score = self.part.scores(self.call, nothing, self.scales, **placed)[0, self.head, query, key]
        (by_q,) = torch.autograd.grad(score, q, create_graph=True)
        rows = [torch.autograd.grad(entry, k, retain_graph=True)[0] for entry in by_q]
        return torch.stack(rows), float(score.detach())


def _placed(
    vector: Float[Tensor, "d_head"], count: int, heads: int, pos: int, head: int
) -> Float[Tensor, "1 pos head d_head"]:
    """Zeros but at one position of one head."""
    here = vector.new_zeros(1, count, heads, 1)
    here[0, pos, head] = 1
    return here * vector


def _call(trace: Trace, layer: int) -> Call:
    """What the model calls the attention of a layer with on the prompt."""
    model = trace.frozen.model
    with model.parts.recorded_calls() as calls:
        model.run_hooked(trace.tokens[None])
    return calls[layer]
