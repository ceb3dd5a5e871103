"""The parts of a bridged model: which there are, what they weigh, and how they are run.

They carry TransformerLens' names: `ln1`, `attn`, `ln1_post`, `ln2`, `mlp`, `ln2_post` in a block, `embed`, `embed_ln`,
`ln_final` and `unembed` around the blocks.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import masking_utils

from transcoders.looks import Look, WatchedScores, WatchedSoftmax

_STATEFUL = ("past_key_values", "layer_past", "use_cache", "cache_position", "hidden_states", "output_attentions")


@dataclass(frozen=True)
class NormPart:
    """A norm: `x ↦ C(x) / scale · weight + bias`, where C subtracts the mean if it `centres`."""

    _module: Any
    eps: float
    _home: torch.device

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self._module(_to(x, self._module)).to(x.device)

    def weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "d_model"]:
        """What it multiplies by (in Gemma's families one more than the parameter), computed in `dtype`."""
        weight = self._module.weight.detach().to(self._home, dtype)
        return weight + 1 if self._module.uses_weight_offset else weight

    @property
    def bias(self) -> Float[Tensor, "d_model"] | None:
        bias = getattr(self._module.original_component, "bias", None)
        return None if bias is None else bias.detach().to(self._home)

    @property
    def centres(self) -> bool:
        return not self._module.uses_rms_norm

    def linear(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """At scale 1 and without its bias: centring, where it centres, and its weights."""
        with _hooked(self._module.hook_scale, torch.ones_like):
            return (self(x[None]) - self(torch.zeros_like(x[None, :1])))[0]


@dataclass(frozen=True)
class Call:
    """What a model calls its attention with besides the stream: masks, rotary positions."""

    named: dict[str, Any]
    by_name: bool
    """Whether what it reads is given by name."""


@dataclass(frozen=True)
class AttentionPart:
    """Attention, run by the model's own module."""

    _module: Any
    _home: torch.device

    def weight(self, kind: str) -> Float[Tensor, "head _ _"]:
        """`W_Q`, `W_K` or `W_V` `[head d_model d_head]`, or `W_O` `[head d_head d_model]`, by its last letter."""
        return getattr(self._module, f"W_{kind}").detach().to(self._home)

    def bias(self, kind: str) -> Float[Tensor, "..."] | None:
        """`b_Q`, `b_K` or `b_V` `[head d_head]`, or `b_O` `[d_model]`, if there is one."""
        bias = getattr(self._module, f"b_{kind}", None)
        return None if bias is None else bias.detach().to(self._home)

    def run(self, normed: Float[Tensor, "batch pos d_model"], call: Call) -> Float[Tensor, "batch pos d_model"]:
        """What attention writes."""
        home, normed = normed.device, _to(normed, self._module)
        named, mask = call.named, call.named.get("attention_mask")
        if isinstance(mask, Tensor):
            named = named | {"attention_mask": mask.expand(len(normed), *mask.shape[1:])}
        out = self._module(hidden_states=normed, **named) if call.by_name else self._module(normed, **named)
        return (out[0] if isinstance(out, tuple) else out).to(home)

    def mixed(self, call: Call, like: Float[Tensor, "batch pos d_model"], **inputs: Tensor) -> Tensor:
        """What `W_O` reads where queries, keys and values (before rotary positions) are `q`, `k` and `v`."""
        found: list[Tensor] = []
        with self._given(inputs), _hooked(self._module.o.hook_in, found.append):
            self.run(like, call)
        return found[0].to(like.device)

    def scores(
        self, call: Call, normed: Float[Tensor, "batch pos d_model"], scales: Mapping[str, Tensor], **inputs: Tensor
    ) -> Float[Tensor, "batch head query key"]:
        """What the softmax takes, the mask included, without a soft cap.

        Queries and keys (before rotary positions) are those given as `q` and `k`, else what the module makes of
        `normed`; their norms, `q_norm` and `k_norm`, have the `scales` given.
        """
        found: list[Tensor] = []
        with ExitStack() as hooks:
            hooks.enter_context(self._given(inputs))
            hooks.enter_context(_without_cap(self._module.original_component))
            for name, scale in scales.items():
                point = getattr(self._module, name).hook_scale
                hooks.enter_context(_hooked(point, lambda out, scale=scale: scale.reshape(out.shape).to(out)))
            hooks.enter_context(_hooked(self._module.hook_attn_scores, found.append))
            hooks.enter_context(WatchedSoftmax(found))  # Hugging Face's own attention shows scores at no hook
            self.run(normed, call)
        return found[0].to(normed.device)

    def wide_norm(self, kind: str) -> NormPart | None:
        """The norm of all heads' queries (`q`) or keys (`k`) together, if there is one (OLMo 2)."""
        norm, weight = getattr(self._module, f"{kind}_norm", None), self.weight(kind.upper())
        own = getattr(norm, "weight", None)
        wide = own is not None and own.numel() == len(weight) * weight.shape[2] > weight.shape[2]
        return NormPart(norm, 0.0, self._home) if wide else None

    def look(self, call: Call, normed: Float[Tensor, "1 pos d_model"]) -> Look:
        """How its heads look where they read `normed`, and what it writes.

        Raises `RuntimeError` where no product of queries and keys is seen to go into the softmax.
        """
        leaves: dict[str, Tensor] = {}

        def leaf(kind: str) -> Callable[[Tensor], Tensor]:
            return lambda out: leaves.setdefault(kind, out.detach().requires_grad_())

        seen = WatchedScores()
        with torch.enable_grad(), ExitStack() as hooks:
            for kind in "qk":
                point = getattr(self._module, kind if self.wide_norm(kind) is None else f"{kind}_norm").hook_out
                hooks.enter_context(_hooked(point, leaf(kind)))
            hooks.enter_context(_hooked(self._module.hook_attn_scores, seen.note_scores))
            hooks.enter_context(seen)
            out = self.run(normed.detach(), call)
            return Look.of(seen, leaves, [len(self.weight("Q")), len(self.weight("K"))], out.detach()[0], self._home)

    @contextmanager
    def _given(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """While it lasts, queries, keys or values (before rotary positions) are these."""
        with ExitStack() as hooks:
            for kind, value in inputs.items():
                point = getattr(self._module, kind).hook_out
                hooks.enter_context(_hooked(point, lambda out, value=value: value.reshape(out.shape).to(out.device)))
            yield


@dataclass(frozen=True)
class BlockPart:
    """One block. Its MLP reads the stream after attention, or in `parallel` blocks the one before it."""

    _module: Any
    _config: Any
    _home: torch.device

    def norm(self, name: str) -> NormPart | None:
        """Its norm of this name, if it has one."""
        if name not in self._module.submodules:
            return None
        return NormPart(getattr(self._module, name), self._config.eps, self._home)

    @property
    def attention(self) -> AttentionPart:
        return AttentionPart(self._module.attn, self._home)

    @property
    def mlp_norm(self) -> str:
        """The name of the norm through which the MLP reads: `ln1` where it shares that of attention."""
        parts = self._module.submodules
        return "ln1" if "ln1" in parts and "ln2" not in parts else "ln2"

    @property
    def parallel(self) -> bool:
        return self.mlp_norm == "ln1" or bool(getattr(self._config, "parallel_attn_mlp", False))

    @property
    def residual_factor(self) -> float | None:
        """What attention's and the MLP's output are multiplied by on their way into the stream (Granite), if at all."""
        factor = getattr(self._module.original_component, "residual_multiplier", None)
        return None if factor is None else float(factor)

    def mlp(self, normed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP writes, given what it reads after its norm."""
        mlp, read = self._module.mlp, _to(normed, self._module)
        if getattr(mlp, "name", "") is None:  # OPT: no module of its own, its two layers lie in the block
            hidden = self._module.original_component.activation_fn(getattr(mlp, "in")(read))
            return mlp.out(hidden).reshape(normed.shape).to(normed.device)
        out = mlp(read)
        return (out[0] if isinstance(out, tuple) else out).reshape(normed.shape).to(normed.device)


class ModelParts:
    """The parts of a bridged model; what they give is on the device of the unembedding, or of what they are given."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self._bridge: Any = bridge

    @property
    def _home(self) -> torch.device:
        return self._bridge.unembed.W_U.device

    @property
    def config(self) -> Any:
        """Hugging Face's, of the model inside."""
        return getattr(self._bridge.original_model, "config", None)

    @cached_property
    def blocks(self) -> tuple[BlockPart, ...]:
        return tuple(BlockPart(block, self._bridge.cfg, self._home) for block in self._bridge.blocks)

    @property
    def embedding_norm(self) -> NormPart | None:
        return self._norm("embed_ln")

    @property
    def final_norm(self) -> NormPart | None:
        return self._norm("ln_final")

    def _norm(self, name: str) -> NormPart | None:
        norm = getattr(self._bridge, name, None)
        return None if norm is None else NormPart(norm, self._bridge.cfg.eps, self._home)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self._bridge.embed(_to(tokens, self._bridge.embed)).to(tokens.device)

    def unembed(self, normed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of what the final norm gives, through a soft cap if there is one."""
        out, cap = self._bridge.unembed(normed), self.logit_cap
        return out if cap is None else cap * torch.tanh(out / cap)

    @property
    def logit_cap(self) -> float | None:
        """c where logits go through `c tanh(x / c)` (Gemma 2), if they do."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return float(cap) if cap else None

    def weights(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers of the model inside, by name."""
        return sorted(self._bridge.original_model.state_dict(keep_vars=True).items())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the whole bridge, by name."""
        for name, weight in self._bridge.named_parameters():
            yield name.replace("_original_component.", ""), weight

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    @property
    def without_cache(self) -> dict[str, Any]:
        """What a run is told so that it does not keep the keys and values of all blocks."""
        return {"use_cache": False} if hasattr(self.config, "use_cache") else {}

    @staticmethod
    def repeated(past: Any, rows: int) -> Any:
        """The same keys and values for each of several rows, in a cache of their own."""
        other = copy.deepcopy(past)
        for layer in other.layers:
            layer.keys, layer.values = (x.expand(rows, *x.shape[1:]) for x in (layer.keys, layer.values))
        return other

    @contextmanager
    def passed_over(self, count: int, stream: Float[Tensor, "batch pos d_model"] | None = None) -> Iterator[None]:
        """While it lasts, the first `count` blocks compute nothing: each gives `stream`, or else what it is given."""
        replaced = list(zip(self._bridge.blocks[:count], self._block_outputs if count else (), strict=False))
        try:
            for block, size in replaced:
                block.__dict__["forward"] = _giving(stream, size)  # set as an attribute, it would go to what is inside
            yield
        finally:
            for block, _ in replaced:
                block.__dict__.pop("forward", None)

    @contextmanager
    def silent_mlps(self, layers: Iterable[int]) -> Iterator[None]:
        """While it lasts, the MLPs of some blocks give zeros without computing, where they are modules of their own.

        For runs that put something else in the place of all that these MLPs give.
        """
        silenced = [self._plain_mlps[layer] for layer in layers if layer in self._plain_mlps]
        try:
            for module in silenced:
                module.__dict__["forward"] = _nothing
            yield
        finally:
            for module in silenced:
                module.__dict__.pop("forward", None)

    @cached_property
    def _plain_mlps(self) -> dict[int, Any]:
        """The MLPs' modules inside, by block, where these are called with a tensor and return one of its shape."""
        found: dict[int, Any] = {}

        def note(layer: int, module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and inputs and output.shape == inputs[0].shape:
                found[layer] = module

        token = torch.zeros(1, 1, dtype=torch.long, device=self._home)
        with torch.no_grad(), ExitStack() as hooks:
            for layer, block in enumerate(self._bridge.blocks):
                module = getattr(getattr(block, "mlp", None), "original_component", None)
                if isinstance(module, torch.nn.Module) and module is not block.original_component:
                    hooks.callback(module.register_forward_hook(partial(note, layer)).remove)
            self._bridge(token, return_type="logits", prepend_bos=False)
        return found

    @cached_property
    def _block_outputs(self) -> tuple[int | None, ...]:
        """For each block how many values it returns, the stream first; None where it returns the stream itself."""
        sizes: list[int | None] = []

        def note(module: Any, inputs: Any, output: Any) -> None:
            sizes.append(len(output) if isinstance(output, tuple) else None)

        token = torch.zeros(1, 1, dtype=torch.long, device=self._home)
        with torch.no_grad(), ExitStack() as hooks:
            for block in self._bridge.blocks:
                hooks.callback(block.register_forward_hook(note).remove)
            self._bridge(token, return_type="logits", prepend_bos=False)
        return tuple(sizes)

    @contextmanager
    def recorded_calls(self) -> Iterator[list[Call]]:
        """What the model calls its attention with in each block, filled as it runs."""
        calls: list[Call] = []

        def record(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept = {name: value for name, value in named.items() if name not in _STATEFUL}
            calls.append(Call(kept, by_name=not arguments))

        with ExitStack() as hooks:
            for block in self._bridge.blocks:
                hooks.callback(block.attn.register_forward_pre_hook(record, with_kwargs=True).remove)
            yield calls

    def bias_groups(self) -> dict[tuple[int, str], list[Tensor]]:
        """The additive parameters outside the MLPs, each once, by (layer, component).

        What follows the blocks (`ln_final`, `unembed`) comes as layer `n_layers`, a norm of the embeddings as layer -1.
        """
        blocks = self._bridge.blocks
        owners = [
            (layer, name, component)
            for layer, block in enumerate(blocks)
            for name, component in block.named_children()
            if name in block.submodules and name != "mlp"
        ]
        around = {"embed_ln": -1, "ln_final": len(blocks), "unembed": len(blocks)}
        owners += [(layer, name, getattr(self._bridge, name, None)) for name, layer in around.items()]
        groups = {(layer, name): _biases(component) for layer, name, component in owners}
        return {key: parameters for key, parameters in groups.items() if parameters}


def _to(x: Tensor, module: Any) -> Tensor:
    """`x` on the device of a module's weights, where it has any."""
    weight = next(module.parameters(), None)
    return x if weight is None else x.to(weight.device)


def _giving(stream: Tensor | None, size: int | None) -> Callable[..., Any]:
    """The forward of a block that gives `stream`, or what it is given, in the form of its own output."""

    def forward(*args: Any, **named: Any) -> Any:
        given = args[0] if args else named["hidden_states"]
        out = given if stream is None else stream.to(given.device)
        return out if size is None else (out, *[None] * (size - 1))

    return forward


def _nothing(read: Tensor, *args: Any, **named: Any) -> Tensor:
    """The forward of an MLP that gives zeros."""
    return torch.zeros_like(read)


def _biases(component: Any) -> list[Tensor]:
    if component is None:
        return []
    submodules = getattr(component, "submodules", {})
    # Where the bridge splits a fused projection into q, k and v, the fused one is no longer used.
    fused = [submodules["qkv"]] if {"qkv", "q"} <= submodules.keys() else []
    dead = {id(parameter) for module in fused for parameter in module.parameters()}
    return [p for name, p in component.named_parameters() if name.endswith("bias") and id(p) not in dead]


@contextmanager
def _hooked(point: Any, edit: Any) -> Iterator[None]:
    """Put `edit(value)`, where it is not None, in the place of what passes a hook point."""
    handle = point.register_forward_hook(lambda module, inputs, value: edit(value))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_cap(attention: Any) -> Iterator[None]:
    """While it lasts, an attention module has no soft cap (Gemma 2)."""
    cap = getattr(attention, "attn_logit_softcapping", None)
    if cap is None:
        yield
        return
    attention.attn_logit_softcapping = None
    try:
        yield
    finally:
        attention.attn_logit_softcapping = cap


_LOOKS = getattr(masking_utils, "find_packed_sequence_indices", None)
"""How transformers asks, by the positions, whether a row holds several texts."""


@contextmanager
def one_text() -> Iterator[None]:
    """A row is taken for one text: transformers would ask in every pass without cache and mask, and a device wait."""
    try:
        if _LOOKS is not None:
            masking_utils.find_packed_sequence_indices = lambda position_ids: None
        yield
    finally:
        if _LOOKS is not None:
            masking_utils.find_packed_sequence_indices = _LOOKS


def kept_apart(positions: Int[Tensor, "batch pos"], dtype: torch.dtype) -> dict[str, Any]:
    """What keeps the texts of a row apart: positions, and what is added to scores, −∞ between texts."""
    text = (positions == 0).cumsum(dim=1)
    seen = (text[:, :, None] == text[:, None, :]).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"position_ids": positions.clamp(min=0), "attention_mask": mask[:, None]}
