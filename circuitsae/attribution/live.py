"""The replacement model's derivative on one prompt, as matrices: attention patterns and norm scales move.

What `linear` holds constant answers here, to first order in what is written into the stream:

    norm        dx ↦ (C dx − u (u · C dx) / d) · weight / scale,   u = C x / scale
    attention   dz(p) = Σ_q A(p, q) dv(q) + dA(p, q) v(q),   dA = A ∘ (dS − Σ_q A dS),   dS = slope (dq · k + q · dk)

Both are linear maps with the interface of the held ones, so that the closed form carries them alike. Of queries and
keys the model's own attention says what the scores are made of (`AttentionPart.look`): rotary positions, norms of
queries and keys, soft caps and sinks need no code of their own.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import (
    Attention,
    Block,
    LinearModel,
    Norm,
    attention_norm,
    exact,
    linear_model,
    norm_of,
    post_norm,
)
from circuitsae.frozen import FrozenModel
from circuitsae.patterns import pattern_hook
from transcoders.errors import ModelError
from transcoders.looks import Look
from transcoders.model_parts import AttentionPart, Call

LOOK_BYTES = 2**29
"""How heads look is held for all layers up to this size, beyond it computed again for each batch of targets."""


@dataclass(frozen=True, kw_only=True)
class LiveNorm(Norm):
    """The derivative of a norm where it reads the clean stream, whose direction `unit` its scale takes out."""

    unit: Float[Tensor, "pos d_model"]

    def forward(self, x: Float[Tensor, "row pos d_model"], first: int = 0) -> Float[Tensor, "row pos d_model"]:
        return super().forward(_without(x, self.unit[first : first + x.shape[1]]), first)

    def forward_at(self, x: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        return super().forward_at(_without(x, self.unit[pos]), pos)

    def transpose(self, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        return _without(super().transpose(g), self.unit[: g.shape[1]])

    def transpose_at(self, g: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        return _without(super().transpose_at(g, pos), self.unit[pos])


def _without(x: Float[Tensor, "*rows d_model"], unit: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*rows d_model"]:
    """`x − u (u · x) / d`; u is centred where the norm centres, so it does not matter which comes first."""
    along = (x * unit).sum(-1, keepdim=True).div_(x.shape[-1])
    return torch.addcmul(x, unit, along, value=-1)


COARSE = 1e-5
"""Of the check of derivatives: some of the models' softmaxes are in float32 whatever the precision."""


class Heads(NamedTuple):
    """Changes of queries, keys and values, or how these are read. Heads may share keys and values."""

    q: Float[Tensor, "head pos row d_head"]
    k: Float[Tensor, "kv pos row d_head"]
    v: Float[Tensor, "kv pos row d_head"]


@dataclass(frozen=True, kw_only=True)
class LiveAttention(Attention):
    """The derivative of attention with its norms at the clean run. `mix` are the patterns as they are.

    `W_in` has what queries, keys and values read, in this order, behind the norm.
    """

    look: Look
    value: Float[Tensor, "head pos d_head"]
    """What the heads move on the clean run."""
    before: Norm
    after: Norm | None
    wide: tuple[Norm | None, Norm | None, None] = (None, None, None)
    """Of queries and keys, norms of all heads together."""

    @property
    def d_head(self) -> int:
        return self.value.shape[2]

    @property
    def moved(self) -> Float[Tensor, "head pos d_head"]:
        """What each head makes of the values on the clean run."""
        return self.mix @ self.value

    @property
    def sizes(self) -> list[int]:
        return [self.n_heads, self.n_kv, self.n_kv]

    def forward(self, x: Float[Tensor, "row pos d_model"], first: int = 0) -> Float[Tensor, "row pos d_model"]:
        return self.write(self.moves(self.heads(self.before.forward(x, first) @ self.W_in, first), first), first)

    def heads(self, projected: Float[Tensor, "row pos _"], first: int = 0) -> Heads:
        """Changes of what W_Q, W_K and W_V give, by head, behind norms of all heads together."""
        sizes = [size * self.d_head for size in self.sizes]
        flat = [
            part if norm is None else norm.forward(part, first)
            for part, norm in zip(projected.split(sizes, dim=2), self.wide, strict=True)
        ]
        return Heads(*(part.unflatten(2, (-1, self.d_head)).permute(2, 1, 0, 3) for part in flat))

    def by_head(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos way_head d_model"]:
        """What each head writes by the values it moves, and then what each writes by looking elsewhere."""
        change = self.heads(self.before.forward(x[None]) @ self.W_in)
        z = torch.stack([self.by_value(change.v, 0), self.by_pattern(change.q, change.k, 0)])[..., 0, :]
        W_out = self.W_out.view(self.n_heads, -1, x.shape[1])
        out = torch.einsum("whpe,hed->whpd", z, W_out).flatten(0, 1)
        return (out if self.after is None else self.after.forward(out)).transpose(0, 1)

    def write(self, z: Float[Tensor, "head pos row d_head"], first: int) -> Float[Tensor, "row pos d_model"]:
        """What heads that change by `z` write into the stream at the positions from `first` on."""
        out = self.out(z)
        return out if self.after is None else self.after.forward(out, first)

    def out(self, z: Float[Tensor, "head pos row d_head"]) -> Float[Tensor, "row pos d_model"]:
        """What heads that change by `z` write, before the norm after attention."""
        return z.permute(2, 1, 0, 3).flatten(2) @ self.W_out

    def moves(self, change: Heads, first: int = 0) -> Float[Tensor, "head pos row d_head"]:
        """How what the heads make changes at the positions from `first` on, where alone `change` is not 0."""
        return self.by_value(change.v, first) + self.by_pattern(change.q, change.k, first)

    def by_value(self, v: Float[Tensor, "kv pos row d_head"], first: int) -> Float[Tensor, "head pos row d_head"]:
        """As far as values change."""
        here, v = slice(first, first + v.shape[1]), self._repeat4(v)
        return (self.mix[:, here, here] @ v.flatten(2)).view(v.shape)

    def by_pattern(
        self, q: Float[Tensor, "head pos row d_head"], k: Float[Tensor, "kv pos row d_head"], first: int
    ) -> Float[Tensor, "head pos row d_head"]:
        """As far as patterns change: `Σ_q dA v`."""
        stop, (n_heads, n, rows, _) = first + q.shape[1], q.shape
        here = slice(first, stop)
        q, k = _through(q, self.look.of_query, here, back=False), _through(k, self.look.of_key, here, back=False)
        by_query = (q.flatten(1, 2) @ self.look.key[:, :stop].mT).view(n_heads, n, rows, stop)
        by_key = self._repeat4(k).flatten(1, 2) @ self.look.query[:, here].mT
        by_query[..., here] += by_key.view(n_heads, n, rows, n).permute(0, 3, 2, 1)
        weighed = by_query * self._slope[:, here, None, :stop]
        moved = (weighed.flatten(1, 2) @ self.value[:, :stop]).view(n_heads, n, rows, -1)
        return moved - weighed.sum(-1, keepdim=True) * self.moved[:, here, None]

    def transpose(self, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        return self.before.transpose(self.behind_norm(g if self.after is None else self.after.transpose(g)))

    def behind_norm(self, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """How what is read of what the heads write, before the norm after them, reads what they read."""
        z = (g @ self.W_out.mT).unflatten(2, (self.n_heads, -1)).permute(2, 1, 0, 3).contiguous()
        flat = [part.permute(2, 1, 0, 3).flatten(2) for part in self.read(z)]
        read = [part if norm is None else norm.transpose(part) for part, norm in zip(flat, self.wide, strict=True)]
        return torch.cat(read, dim=2) @ self.W_in.mT

    def read(self, z: Float[Tensor, "head pos row d_head"]) -> Heads:
        """How what is read of the heads as `z` says reads queries, keys and values, from the first position on."""
        n_heads, n, rows, _ = z.shape
        value, here = self.value[:, :n], slice(n)
        weighed = (z.flatten(1, 2) @ value.mT).view(n_heads, n, rows, n)
        weighed -= (z * self.moved[:, :n, None]).sum(-1, keepdim=True)
        weighed *= self._slope[:, :n, None, :n]
        q = (weighed.flatten(1, 2) @ self.look.key[:, :n]).view(z.shape)
        by_key = weighed.permute(0, 3, 2, 1).reshape(n_heads, n * rows, n)
        k = (by_key @ self.look.query[:, :n]).view(z.shape)
        v = (self.mix[:, :n, :n].mT @ z.flatten(2)).view(z.shape)
        k, v = (part.unflatten(0, (self.n_kv, -1)).sum(1) if self.n_kv < n_heads else part for part in (k, v))
        q, k = (_through(part, J, here, back=True) for part, J in ((q, self.look.of_query), (k, self.look.of_key)))
        return Heads(q, k, v)

    @property
    def _slope(self) -> Float[Tensor, "head pos pos"]:
        """A pattern's, of how query and key go together."""
        return self.mix * self.look.slope

    def _repeat4(self, part: Float[Tensor, "kv pos row d_head"]) -> Float[Tensor, "head pos row d_head"]:
        return part.contiguous() if len(part) == self.n_heads else part.repeat_interleave(self.n_heads // len(part), 0)

    def forward_from(
        self, x: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"], first: int
    ) -> Float[Tensor, "row pos d_model"]:
        return self.forward(_at(x, pos - first, self.mix.shape[1] - first), first)

    def transpose_from(
        self, g: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"], count: int
    ) -> Float[Tensor, "row pos d_model"]:
        g, row = g if self.after is None else self.after.transpose_at(g, pos), torch.arange(len(g), device=g.device)
        z = (g @ self.W_out.mT).unflatten(1, (self.n_heads, -1)).transpose(0, 1)
        weighed = z @ self.value[:, :count].mT - (z * self.moved[:, pos]).sum(-1, keepdim=True)
        weighed = weighed * self._slope[:, pos, :count]
        W_Q, W_K, W_V = (W.unflatten(1, (-1, self.d_head)).permute(1, 2, 0) for W in self._weights)
        read = torch.bmm(self.mix[:, pos, :count].permute(1, 2, 0), torch.bmm(z, self._repeat(W_V)).transpose(0, 1))
        query = self.look.query[:, pos]
        if self.look.of_key is None and self.wide[1] is None:
            by_key = torch.bmm(query, self._repeat(W_K)).transpose(0, 1)
            read.baddbmm_(weighed.permute(1, 2, 0), by_key)
        else:
            k = weighed.mT[..., None] * query[:, None]
            k = k.unflatten(0, (self.n_kv, -1)).sum(1) if self.n_kv < self.n_heads else k
            k = _through(k, self.look.of_key, slice(count), back=True).permute(2, 1, 0, 3).flatten(2)
            read += (k if self.wide[1] is None else self.wide[1].transpose(k)) @ W_K.flatten(0, 1)
        q = weighed @ self.look.key[:, :count]
        if self.look.of_query is not None:
            q = torch.einsum("hre,hrei->hri", q, self.look.of_query[:, pos])
        q = q.transpose(0, 1).flatten(1)
        read[row, pos] += (q if self.wide[0] is None else self.wide[0].transpose_at(q, pos)) @ W_Q.flatten(0, 1)
        return self.before.transpose(read)

    @property
    def _weights(self) -> tuple[Tensor, ...]:
        """W_Q, W_K and W_V, heads side by side."""
        return self.W_in.split([size * self.d_head for size in self.sizes], dim=1)


def _at(x: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"], count: int) -> Float[Tensor, "row pos d_model"]:
    """Zeros but at one position of each row."""
    out = x.new_zeros(len(x), count, x.shape[1])
    out[torch.arange(len(x), device=x.device), pos] = x
    return out


def _through(
    part: Float[Tensor, "head pos row d_head"], jacobian: Tensor | None, here: slice, *, back: bool
) -> Float[Tensor, "head pos row d_head"]:
    """By rotary positions and norms of queries or keys, `[head pos out in]`, or `back`."""
    if jacobian is None:
        return part
    there = jacobian[:, here]
    return part @ (there if back else there.mT)


def live_model(frozen: FrozenModel) -> LinearModel:
    """The matrices of the derivative of a frozen model whose patterns and scales move.

    Raises `ModelError` as `linear_model` does, and where they are not the derivative of the model's own attention.
    """
    held = linear_model(frozen)
    with frozen.model.parts.recorded_calls() as calls:
        frozen.model.run_hooked(frozen.tokens[None])
    embed_norm, stream = held.after_embed, held.embed
    if held.after_embed is not None:
        embed_norm, stream = _live(held.after_embed, stream), value_of(held.after_embed, stream)
    blocks = []
    for layer, block in enumerate(held.blocks):
        try:
            live, stream = _block(frozen, layer, block, calls[layer], stream)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"The attention of layer {layer} of {frozen.model.name} cannot be differentiated ({reason})"
            ) from error
        blocks.append(live)
    return replace(held, blocks=blocks, after_embed=embed_norm, final=_live(held.final, stream))


def _block(
    frozen: FrozenModel, layer: int, held: Block, call: Call, stream: Float[Tensor, "pos d_model"]
) -> tuple[Block, Float[Tensor, "pos d_model"]]:
    """The derivative of a block where it reads the clean `stream`, and the stream after it."""
    part = frozen.model.parts.blocks[layer]
    before, after = attention_norm(frozen, layer), post_norm(frozen, layer, "ln1_post")
    normed = value_of(before, stream)
    look = partial(part.attention.look, call, normed[None].to(frozen.model.dtype))
    seen = look()
    if part.norm("ln1") is not None:
        before = _live(before, stream)
    if after is not None and part.norm("ln1_post") is not None:
        after = _live(after, seen.out)
    build = partial(_attention, frozen, layer, normed=normed, before=before, after=after)
    attention = build(seen)
    _check(frozen, layer, attention, call, normed)
    middle = stream + held.attention.forward(stream[None])[0] + sum(held.bias_writes.values())
    read_from, written = stream if held.parallel else middle, frozen.writes.mlp_out[layer].to(stream)
    read, write = held.read, held.write
    if frozen.read_sites[layer].kind != "resid_mid" and part.norm(held.mlp_norm) is not None:
        read = _live(read, read_from)
    if write is not None and part.norm("ln2_post") is not None:
        write = _live(write, written)
    mlp_read, mlp_write = held.mlp_read, held.mlp_write
    if part.norm(held.mlp_norm) is not None:
        mlp_read = _live(mlp_read, read_from)
    if mlp_write is not None and part.norm("ln2_post") is not None:
        mlp_write = _live(mlp_write, part.mlp(value_of(held.mlp_read, read_from)[None].to(frozen.model.dtype))[0])
    keep = seen.n_bytes * frozen.model.n_layers <= LOOK_BYTES and not frozen.recomputed
    live = replace(
        held,
        kept_attention=attention if keep else lambda: build(look()),
        bias_writes=_bias_writes(part.attention, attention, normed),
        read=read,
        write=write,
        mlp_read=mlp_read,
        mlp_write=mlp_write,
    )
    return live, middle + (written if held.write is None else held.write.forward(written[None])[0])


def _live(norm: Norm, x: Float[Tensor, "pos d_model"]) -> LiveNorm:
    centred = x - x.mean(-1, keepdim=True) if norm.centres else x
    return LiveNorm(norm.weight, norm.scale, norm.centres, norm.bias, unit=centred / norm.scale[:, None])


def value_of(norm: Norm, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
    """A norm of the clean stream, its bias too."""
    out = norm.forward(x[None])[0]
    return out if norm.bias is None else out + norm.bias


def _attention(
    frozen: FrozenModel,
    layer: int,
    look: Look,
    *,
    normed: Float[Tensor, "pos d_model"],
    before: Norm,
    after: Norm | None,
) -> LiveAttention:
    part = frozen.model.parts.blocks[layer].attention
    W_Q, W_K, W_V, W_O = (exact(part.weight(kind)) for kind in "QKVO")
    value = _projected(part, "V", normed)
    return LiveAttention(
        mix=exact(frozen.constants[pattern_hook(layer)][0]),
        W_in=torch.cat([W.transpose(0, 1).flatten(1) for W in (W_Q, W_K, W_V)], dim=1),
        W_out=W_O.flatten(0, 1),
        n_kv=len(W_V),
        look=look,
        value=value.repeat_interleave(len(W_Q) // len(W_V), 0),
        wide=(_wide(frozen, layer, "q", normed), _wide(frozen, layer, "k", normed), None),
        before=before,
        after=after,
    )


def _projected(
    part: AttentionPart, kind: str, normed: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "head pos d_head"]:
    """What W_Q, W_K or W_V gives on the clean run."""
    W, b = exact(part.weight(kind)), part.bias(kind)
    out = torch.einsum("pd,hde->hpe", normed.to(W), W)
    return out if b is None else out + exact(b).view(len(W), 1, -1)


def _wide(frozen: FrozenModel, layer: int, kind: str, normed: Float[Tensor, "pos d_model"]) -> LiveNorm | None:
    """The derivative of a norm of all heads' queries or keys together."""
    part = frozen.model.parts.blocks[layer].attention
    if (norm := part.wide_norm(kind)) is None:
        return None
    read = _projected(part, kind.upper(), normed).transpose(0, 1).flatten(1)
    return _live(norm_of(frozen, norm, f"blocks.{layer}.attn.{kind}_norm"), read)


def _bias_writes(
    part: AttentionPart, attention: LiveAttention, normed: Float[Tensor, "pos d_model"]
) -> dict[str, Float[Tensor, "pos d_model"]]:
    """What biases write to first order, by component: also those of queries and keys."""
    writes: dict[str, Tensor] = {}

    def moved(projected: Tensor) -> Tensor:
        return attention.moves(attention.heads(projected.expand(1, len(normed), -1)))

    if (bias := attention.before.bias) is not None:
        writes["ln1"] = attention.write(moved(bias @ attention.W_in), 0)[0]
    own = [part.bias(kind) for kind in "QKV"]
    b_O = part.bias("O")
    if b_O is not None or any(b is not None for b in own):
        given = [
            normed.new_zeros(n * attention.d_head) if b is None else exact(b).flatten()
            for b, n in zip(own, attention.sizes, strict=True)
        ]
        out = attention.out(moved(torch.cat(given)))
        out = out if b_O is None else out + exact(b_O)
        writes["attn"] = (out if attention.after is None else attention.after.forward(out))[0]
    return writes


def _check(
    frozen: FrozenModel, layer: int, attention: LiveAttention, call: Call, normed: Float[Tensor, "pos d_model"]
) -> None:
    """Raises `ModelError` where this is not the derivative of the model's own attention, in a random direction."""
    generator = torch.Generator().manual_seed(layer)
    g = torch.randn(normed.shape, generator=generator, dtype=torch.float64).to(normed)[None]
    with torch.enable_grad():
        read = normed[None].to(frozen.model.dtype).detach().requires_grad_()
        out = frozen.model.parts.blocks[layer].attention.run(read, call)
        (theirs,) = torch.autograd.grad(out, read, g.to(out))
    ours = attention.behind_norm(g)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= max(torch.finfo(frozen.model.dtype).eps ** 0.5, COARSE):
        raise ModelError(
            f"The derivative of the attention of layer {layer} of {frozen.model.name} differs by {error:.1e} from what "
            "its queries and keys say: its architecture differs from those of the closed form"
        )
