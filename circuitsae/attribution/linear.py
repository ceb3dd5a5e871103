"""A prompt's frozen model as matrices: what `FrozenModel` computes by running modules, ready for matrix products.

With patterns `A_h` and norm scales `s` constant, attention is `x ↦ Σ_h A_h x W_V,h W_O,h` around frozen norms, whose
weights are folded into `W_V` and `W_O` and whose scales into the patterns. What is carried through the layers has shape
`[row, pos, d_model]`, a row for each source or target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.frozen import FrozenModel, Reads
from circuitsae.patterns import pattern_hook
from transcoders.errors import ModelError
from transcoders.model_parts import AttentionPart, NormPart
from transcoders.sites import SiteKind

WHOLE = 1024
"""Positions up to which a pattern is multiplied with the zeros above its diagonal, as one product."""


@dataclass(frozen=True)
class Norm:
    """`x ↦ C(x) · weight / scale`, with C the subtraction of the mean where the norm centres. `bias` stands apart."""

    weight: Float[Tensor, "d_model"]
    scale: Float[Tensor, "pos"]
    centres: bool
    bias: Float[Tensor, "d_model"] | None = None

    def forward(self, x: Float[Tensor, "row pos d_model"], first: int = 0) -> Float[Tensor, "row pos d_model"]:
        """Of rows at the positions from `first` on."""
        return self._forward(x, self.scale[first : first + x.shape[1], None])

    def forward_at(self, x: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        """Of one position for each row."""
        return self._forward(x, self.scale[pos, None])

    def _forward(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.centres:
            return x * (self.weight / scale)
        return (x - x.mean(-1, keepdim=True)).mul_(self.weight / scale)

    def transpose(self, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        return self._transpose(g, self.scale[: g.shape[1], None])

    def transpose_at(self, g: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        """Of one position for each row."""
        return self._transpose(g, self.scale[pos, None])

    def _transpose(self, g: Tensor, scale: Tensor) -> Tensor:
        out = g * (self.weight / scale)
        return out.sub_(out.mean(-1, keepdim=True)) if self.centres else out


@dataclass(frozen=True)
class Attention:
    """Frozen attention with its norms: `y(p) = Σ_h Σ_q mix[h, p, q] · (x(q) W_in)_h W_out,h`."""

    mix: Float[Tensor, "head pos pos"]
    """Patterns over the scales of the norm before (at q) and of the norm after (at p)."""
    W_in: Float[Tensor, "d_model kv_d_head"]
    W_out: Float[Tensor, "h_d_head d_model"]
    n_kv: int

    @property
    def n_heads(self) -> int:
        return len(self.mix)

    @property
    def d_head(self) -> int:
        return self.W_in.shape[1] // self.n_kv

    def forward(self, x: Float[Tensor, "row pos d_model"], first: int = 0) -> Float[Tensor, "row pos d_model"]:
        """What rows at the positions from `first` on write at these positions."""
        here = slice(first, first + x.shape[1])
        mix = self.mix[:, here, here]
        return self._hop(x, self.W_in, self.n_kv, mix, self.W_out, self.n_heads, later=False)

    def by_head(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos head d_model"]:
        """What each head writes: `forward` before the sum over heads."""
        z = self.mix @ self._per_head(x @ self.W_in, self.n_kv)
        return torch.einsum("hpd,hdm->phm", z, self.W_out.view(self.n_heads, -1, x.shape[1]))

    def transpose(self, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """How what is read from the attention's output at positions 0, 1, … reads the stream before it."""
        mix = self.mix[:, : g.shape[1], : g.shape[1]].mT
        return self._hop(g, self.W_out.mT, self.n_heads, mix, self.W_in.mT, self.n_kv, later=True)

    def _hop(self, x: Tensor, down: Tensor, n_down: int, mix: Tensor, up: Tensor, n_up: int, *, later: bool) -> Tensor:
        row, pos, d = x.shape
        z = (x.reshape(-1, d) @ down).view(row, pos, n_down, -1).permute(2, 1, 0, 3).reshape(n_down, pos, -1)
        z = _triangular(mix, self._repeat(z), later)
        if n_up < self.n_heads:
            z = z.unflatten(0, (n_up, -1)).sum(1)
        return (z.view(n_up, pos, row, -1).permute(2, 1, 0, 3).reshape(row * pos, -1) @ up).view(row, pos, -1)

    def forward_from(
        self, x: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"], first: int
    ) -> Float[Tensor, "row pos d_model"]:
        """`forward` of rows that are zero but at one position each, at the positions from `first` on.

        A row's vector goes through each head once and is spread over the positions last: 4d² operations, not 4·pos·d².
        """
        z = self._per_head(x @ self.W_in, self.n_kv)
        through = torch.bmm(z, self.W_out.view(self.n_heads, -1, x.shape[1]))
        return torch.bmm(self.mix[:, first:, pos].permute(2, 1, 0), through.transpose(0, 1))

    def transpose_from(
        self, g: Float[Tensor, "row d_model"], pos: Int[Tensor, "row"], count: int
    ) -> Float[Tensor, "row pos d_model"]:
        """`transpose` of rows that are zero but at one position each, at the first `count` positions."""
        z = self._per_head(g @ self.W_out.mT, self.n_heads)
        heads_in = self.W_in.view(g.shape[1], self.n_kv, -1).permute(1, 2, 0)
        through = torch.bmm(z, self._repeat(heads_in))
        return torch.bmm(self.mix[:, pos, :count].permute(1, 2, 0), through.transpose(0, 1))

    def _per_head(self, z: Float[Tensor, "row _"], n: int) -> Float[Tensor, "head row d_head"]:
        return self._repeat(z.unflatten(1, (n, -1)).transpose(0, 1))

    def _repeat(self, z: Float[Tensor, "kv _ _"]) -> Float[Tensor, "head _ _"]:
        """One for each head, where heads share keys and values."""
        return z if len(z) == self.n_heads else z.repeat_interleave(self.n_heads // len(z), dim=0)


def _triangular(mix: Float[Tensor, "head p q"], z: Float[Tensor, "head q _"], later: bool) -> Float[Tensor, "head p _"]:
    """`mix @ z`, where a position sees none before it (`later`) or none after it; of long prompts without the zeros."""
    n = mix.shape[1]
    if n <= WHOLE:
        return torch.bmm(mix, z)
    out = z.new_empty(len(mix), n, z.shape[2])
    for start in range(0, n, WHOLE // 2):
        here = slice(start, start + WHOLE // 2)
        seen = slice(start, n) if later else slice(0, here.stop)
        out[:, here] = torch.bmm(mix[:, here, seen], z[:, seen])
    return out


@dataclass(frozen=True)
class Block:
    """One block. Its dictionary reads the stream after attention, or in `parallel` blocks the one before it."""

    kept_attention: Attention | Callable[[], Attention]
    """Of a long prompt only what computes it."""
    bias_writes: dict[str, Float[Tensor, "pos d_model"]]
    """What the biases of attention and of its norms add to the residual stream, whatever the input."""
    read: Norm
    """From the stream to what the dictionary reads: the MLP's norm, that without its weight and bias, or nothing."""
    write: Norm | None
    """What is written passes this before it is added to the stream: a norm, a constant factor, or nothing."""
    mlp_norm: str
    """The component that `read` is, where it has a bias."""
    mlp_read: Norm
    """From the stream to what the MLP itself reads."""
    mlp_write: Norm | None
    """What the MLP itself writes passes this."""
    parallel: bool

    @property
    def attention(self) -> Attention:
        """Of a long prompt it is computed each time: whoever asks drops it before asking for another layer's."""
        return self.kept_attention if isinstance(self.kept_attention, Attention) else self.kept_attention()


@dataclass(frozen=True)
class LinearModel:
    """Every block of a model on one prompt, and the final norm."""

    blocks: Sequence[Block]
    final: Norm
    embed: Float[Tensor, "pos d_model"]
    """Embeddings with positions, as written."""
    after_embed: Norm | None
    """What norm these pass before the first block reads them."""
    recomputed: int = 0
    """`FrozenModel.recomputed`."""

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.final.scale.dtype


def linear_model(frozen: FrozenModel) -> LinearModel:
    """The matrices of a frozen model.

    Raises `ModelError` where its architecture is not one of those that these matrices describe: they are run once on
    the prompt and compared with what the model itself read.
    """
    parts = frozen.model.parts
    if parts.final_norm is None:
        raise ModelError(f"{frozen.model.name} has no final norm, which the closed form needs")
    try:
        blocks = [_block(frozen, layer) for layer in range(frozen.model.n_layers)]
        final = norm_of(frozen, parts.final_norm, "ln_final")
        after_embed = None if parts.embedding_norm is None else norm_of(frozen, parts.embedding_norm, "embed_ln")
    except (AttributeError, KeyError) as error:
        raise ModelError(f"{frozen.model.name} has no {error.args[0]}, which the closed form needs") from error
    position = 0 if frozen.writes.position is None else frozen.writes.position
    embed = (frozen.writes.embed + position).to(final.scale.dtype)
    model = LinearModel(blocks, final, embed, after_embed, frozen.recomputed)
    _check(model, frozen)
    return model


def _block(frozen: FrozenModel, layer: int) -> Block:
    block, name = frozen.model.parts.blocks[layer], f"blocks.{layer}."
    norms = {
        label: norm_of(frozen, norm, name + label)
        for label in ("ln1", "ln1_post", "ln2", "ln2_post")
        if (norm := block.norm(label)) is not None
    }
    nothing = _factor(frozen, 1.0)
    after = None if block.residual_factor is None else _factor(frozen, block.residual_factor)
    around = {"before": norms.get("ln1", nothing), "after": norms.get("ln1_post", after)}
    pattern = frozen.constants[pattern_hook(layer)][0]
    build = partial(_attention, block.attention, **around)
    return Block(
        kept_attention=partial(_recomputed, build, frozen, layer) if frozen.recomputed else build(pattern),
        bias_writes=_bias_writes(block.attention, pattern, **around),
        read=_read(frozen.read_sites[layer].kind, norms.get(block.mlp_norm, nothing), nothing),
        write=None if frozen.write_sites[layer].kind == "mlp_added" else norms.get("ln2_post", after),
        mlp_norm=block.mlp_norm,
        mlp_read=norms.get(block.mlp_norm, nothing),
        mlp_write=norms.get("ln2_post", after),
        parallel=block.parallel,
    )


def attention_norm(frozen: FrozenModel, layer: int) -> Norm:
    """From the stream to what attention of `layer` reads."""
    norm = frozen.model.parts.blocks[layer].norm("ln1")
    return _factor(frozen, 1.0) if norm is None else norm_of(frozen, norm, f"blocks.{layer}.ln1")


def post_norm(frozen: FrozenModel, layer: int, name: str) -> Norm | None:
    """What attention (`ln1_post`) or the MLP (`ln2_post`) of `layer` passes into the stream by: a norm, or a factor."""
    part = frozen.model.parts.blocks[layer]
    if (norm := part.norm(name)) is not None:
        return norm_of(frozen, norm, f"blocks.{layer}.{name}")
    return None if part.residual_factor is None else _factor(frozen, part.residual_factor)


def _read(kind: SiteKind, norm: Norm, nothing: Norm) -> Norm:
    """From the stream to a site of the MLP's."""
    if kind == "resid_mid":
        return nothing
    return norm if kind == "mlp_in" else replace(norm, weight=torch.ones_like(norm.weight), bias=None)


def _factor(frozen: FrozenModel, value: float) -> Norm:
    """A norm that multiplies by a constant."""
    read = exact(frozen.reads.final)
    return Norm(weight=torch.full_like(read[0], value), scale=torch.ones_like(read[:, 0]), centres=False)


def norm_of(frozen: FrozenModel, component: NormPart, name: str) -> Norm:
    """A norm of the model's with the scales that it has at its component `name`."""
    scale = exact(frozen.constants[f"{name}.hook_scale"].reshape(-1))
    return Norm(
        weight=component.weight(torch.promote_types(frozen.model.dtype, torch.float32)),
        scale=scale,
        centres=component.centres,
        bias=None if component.bias is None else exact(component.bias),
    )


def _recomputed(build: Callable[[Tensor], Attention], frozen: FrozenModel, layer: int) -> Attention:
    return build(frozen.constants[pattern_hook(layer)][0])


def _unfolded(attention: AttentionPart, pattern: Float[Tensor, "head pos pos"]) -> Attention:
    """Without its norms."""
    W_V, W_O = exact(attention.weight("V")), exact(attention.weight("O"))
    n_kv, d_model = W_V.shape[:2]
    return Attention(exact(pattern), W_V.transpose(0, 1).reshape(d_model, -1), W_O.reshape(-1, d_model), n_kv)


def _attention(
    attention: AttentionPart, pattern: Float[Tensor, "head pos pos"], *, before: Norm, after: Norm | None
) -> Attention:
    whole = _unfolded(attention, pattern)
    folded, mix, out = whole.W_in * before.weight[:, None], whole.mix / before.scale, whole.W_out
    if before.centres:
        folded -= folded.mean(0)
    if after is not None:
        out = (out - out.mean(1, keepdim=True) if after.centres else out) * after.weight
        mix = mix / after.scale[:, None]
    return Attention(mix, folded, out, whole.n_kv)


def _bias_writes(
    attention: AttentionPart, pattern: Float[Tensor, "head pos pos"], *, before: Norm, after: Norm | None
) -> dict[str, Float[Tensor, "pos d_model"]]:
    """By component."""
    whole = _unfolded(attention, pattern)
    writes = {"ln1": before.bias} if before.bias is not None else {}
    writes = {label: _constant(whole, bias @ whole.W_in) for label, bias in writes.items()}
    b_V, b_O = attention.bias("V"), attention.bias("O")
    own = [_constant(whole, exact(b_V).reshape(-1))] if b_V is not None else []
    own += [exact(b_O).expand(len(pattern[0]), -1)] if b_O is not None else []
    if own:
        writes["attn"] = sum(own[1:], own[0])
    return writes if after is None else {label: after.forward(w[None])[0] for label, w in writes.items()}


def _constant(attention: Attention, value: Float[Tensor, "kv_d_head"]) -> Float[Tensor, "pos d_model"]:
    """What attention writes if every position has the same value vector."""
    heads = attention._per_head(value[None], attention.n_kv)  # head 1 d_head
    mixed = attention.mix.sum(-1).mT[:, :, None] * heads[:, 0]  # pos head d_head
    return mixed.flatten(1) @ attention.W_out


def exact(tensor: Tensor) -> Tensor:
    """In float32 where a tensor is less precise: sums over many paths need it."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _check(model: LinearModel, frozen: FrozenModel) -> None:
    reads = reads_of(model, frozen)
    for name, ours, theirs in (
        *(
            (f"the dictionary of layer {i}", a, b)
            for i, (a, b) in enumerate(zip(reads.by_layer, frozen.reads.by_layer, strict=True))
        ),
        ("the unembedding", reads.final, frozen.reads.final),
    ):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if (
            not error <= torch.finfo(frozen.model.dtype).eps ** 0.5
        ):  # rounding alone is far below, another architecture above
            raise ModelError(
                f"What {name} of {frozen.model.name} reads differs by {error:.1e} from what its weights say: "
                "its architecture differs from those of the closed form"
            )


def reads_of(model: LinearModel, frozen: FrozenModel) -> Reads:
    """What is read on the clean prompt, from the clean writes: the map run forward."""
    stream, norm = model.embed[None], model.after_embed
    stream = stream if norm is None else _with_bias(norm.forward(stream), norm)
    by_layer = []
    for layer, block in enumerate(model.blocks):
        middle = stream + block.attention.forward(stream)
        for written in block.bias_writes.values():
            middle = middle + written
        read = block.read.forward(stream if block.parallel else middle)
        by_layer.append(_with_bias(read, block.read)[0])
        written = frozen.writes.mlp_out[layer].to(stream)[None]
        stream = middle + (written if block.write is None else block.write.forward(written))
    return Reads(torch.stack(by_layer), _with_bias(model.final.forward(stream), model.final)[0])


def _with_bias(read: Tensor, norm: Norm) -> Tensor:
    return read if norm.bias is None else read + norm.bias
