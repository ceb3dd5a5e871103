"""LanguageModel: the adapter over TransformerLens' `TransformerBridge`."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from transcoders.errors import PromptError
from transcoders.patterns import make_patterns_editable
from transcoders.precision import Precision, as_dtype
from transcoders.remembering import remembered
from transcoders.sites import Frame, Site

Hook = Callable[[Tensor], Tensor | None]

_FINGERPRINT_VALUES = 4096


def _hash_of(weights: Sequence[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights:
        values = weight.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _FINGERPRINT_VALUES)]
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


class _AllFound(Exception):  # noqa: N818 - no error: how a forward pass is left early
    """Raised in a hook once everything asked for has been read."""


class LanguageModel:
    """A decoder-only language model: text or tokens in, logits and named activations out.

    Holds no hooks between calls; its weights do not require gradients.
    """

    def __init__(self, bridge: TransformerBridge, name: str, frame: Frame = Frame()) -> None:
        self.bridge = bridge
        self.name = name
        self.frame = frame
        bridge.eval()
        bridge.requires_grad_(False)
        # Hugging Face's own RMSNorm rounds to float32 whatever the dtype; the bridge's keeps float64 and takes edits.
        for module in bridge.modules():
            if isinstance(module, NormalizationBridge):
                module.use_native_layernorm_autograd = False
        make_patterns_editable(bridge)

    n_layers = property(lambda self: int(self.bridge.cfg.n_layers), doc="Number of blocks.")
    d_model = property(lambda self: int(self.bridge.cfg.d_model), doc="Width of the residual stream.")
    d_vocab = property(lambda self: int(self.bridge.cfg.d_vocab), doc="Number of tokens.")
    context = property(lambda self: int(self.bridge.cfg.n_ctx), doc="Longest sequence of tokens.")

    @property
    def device(self) -> torch.device:
        return self.W_U.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_U.dtype

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding: logits = x W_U (+ b_U)."""
        return self.bridge.unembed.W_U

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, or None where the model has none."""
        owner: Any = self.bridge.tokenizer if self.has_tokenizer else self.bridge.original_model.config
        return getattr(owner, "bos_token_id", None)

    def to(self, dtype: Precision) -> "LanguageModel":
        """This model, converted in place to another precision."""
        self.bridge.to(as_dtype(dtype))
        return self

    def fingerprint(self) -> str:
        """A short hash of the weights (names, shapes, and up to 4,096 evenly spaced values of each).

        It is remembered until a weight changes; changes through `.data` and in inference mode go unseen.
        """
        weights = sorted(self.bridge.original_model.state_dict(keep_vars=True).items())
        return remembered(self, (weight for _, weight in weights), lambda: _hash_of(weights))

    # text and tokens

    def to_tokens(self, text: str, *, prepend_bos: bool | None = None) -> Int[Tensor, "pos"]:
        """Token ids of `text`, with BOS first unless the model was trained without one.

        Raises `PromptError` for an empty text, or one longer than the context.
        """
        if not text.strip():
            raise PromptError(f"The prompt is empty ({text!r}); give at least one word.")
        ids = self._encode(text)
        prepend = self.bridge.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if prepend and self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return self.check_tokens(torch.tensor(ids, device=self.device))

    def check_tokens(self, tokens: Int[Tensor, "pos"]) -> Int[Tensor, "pos"]:
        """`tokens` on this model's device; raises `PromptError` where the model cannot take them."""
        if tokens.ndim != 1 or len(tokens) == 0:
            raise PromptError(f"Tokens must be one non-empty row of ids; got shape {tuple(tokens.shape)}.")
        if len(tokens) > self.context:
            raise PromptError(
                f"The prompt has {len(tokens)} tokens, but {self.name} reads at most {self.context}; shorten it."
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.d_vocab:
            raise PromptError(
                f"Token ids run from {int(tokens.min())} to {int(tokens.max())}, but {self.name} "
                f"has ids 0 to {self.d_vocab - 1}."
            )
        return tokens.to(self.device)

    def token_id(self, text: str) -> int:
        """The id of a text that is exactly one token; raises `PromptError` otherwise."""
        ids = self._encode(text)
        if len(ids) != 1:
            # A SentencePiece tokenizer puts a space before what it encodes, so that not every token encodes to itself.
            piece = self.bridge.tokenizer.get_vocab().get(text.replace(" ", "\u2581"))
            ids = ids if piece is None else [piece]
        if len(ids) != 1:
            pieces = [self.token_string(i) for i in ids]
            raise PromptError(
                f"{text!r} is {len(ids)} tokens ({pieces}) in {self.name}, not one; "
                "give a single token (mind the leading space)."
            )
        return ids[0]

    def token_string(self, token: int) -> str:
        """The text of one token, leading space included; `#id` where the model has no tokenizer."""
        if not self.has_tokenizer:
            return f"#{token}"
        tokenizer: Any = self.bridge.tokenizer
        piece = tokenizer.convert_ids_to_tokens(int(token))
        # SentencePiece writes spaces as U+2581; `decode` of a single id would drop one at its start.
        if isinstance(piece, str) and "\u2581" in piece:
            return piece.replace("\u2581", " ")
        return tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)

    def token_strings(self, tokens: Int[Tensor, "pos"]) -> list[str]:
        """One string per position."""
        return [self.token_string(int(t)) for t in tokens]

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.bridge.tokenizer is not None and self.bridge.tokenizer.vocab_size)

    def _encode(self, text: str) -> list[int]:
        if not self.has_tokenizer:
            raise PromptError(f"{self.name} has no tokenizer; give token ids instead of the text {text[:40]!r}.")
        return list(self.bridge.tokenizer.encode(text, add_special_tokens=False))

    # running

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Iterable[Site] = (),
        edits: Mapping[Site, Hook] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[Site, Float[Tensor, "batch pos d_model"]]]:
        """Logits and the activations at `sites`, with the activations at `edits` replaced by what the hooks return."""
        hooks = {site.hook: hook for site, hook in (edits or {}).items()}
        by_name = {site.hook: site for site in sites}
        logits, cache = self.run_hooked(tokens, read=by_name, write=hooks)
        return logits, {by_name[name]: value for name, value in cache.items()}

    def activations(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
    ) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """The activations at `sites`; nothing after the last of them is computed."""
        found: dict[Site, Tensor] = {}
        by_name = {site.hook: site for site in sites}

        def store(value: Tensor, hook: Any) -> None:
            found[by_name[hook.name]] = value
            if len(found) == len(by_name):
                raise _AllFound

        if by_name:
            hooks: list[tuple[Any, Any]] = [(name, store) for name in by_name]
            with contextlib.suppress(_AllFound):
                self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False)
        return found

    def run_hooked(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        read: Iterable[str] = (),
        write: Mapping[str, Hook] | None = None,
        past: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`run` in terms of TransformerBridge hook names; writes are applied before reads.

        `past` (of `new_cache`) holds the keys and values of earlier positions, and takes those of `tokens`.
        """
        cache: dict[str, Tensor] = {}

        def reader(name: str) -> Callable[..., None]:
            def store(value: Tensor, hook: Any) -> None:
                cache[name] = value

            return store

        def writer(edit: Hook) -> Callable[..., Tensor | None]:
            return lambda value, hook: edit(value)

        hooks: list[tuple[Any, Any]] = [(name, writer(edit)) for name, edit in (write or {}).items()]
        hooks += [(name, reader(name)) for name in read]
        kept = {} if past is None else {"past_key_values": past, "use_cache": True}
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False, **kept)
        return logits, cache

    def new_cache(self) -> Any:
        """An empty cache of keys and values for `run_hooked`."""
        from transformers import DynamicCache

        config: Any = self.bridge.original_model.config
        return DynamicCache(config=config)

    def has_hook(self, name: str) -> bool:
        return name in self.bridge.hook_dict

    def bias_groups(self) -> dict[tuple[int, str], list[Tensor]]:
        """The additive parameters outside the MLPs, each once, by (layer, component).

        Components carry TransformerBridge's names: `ln1`, `attn`, `ln2` of a block; then, as layer `n_layers`, what
        follows the blocks (`ln_final`, `unembed`), and as layer -1 a norm of the embeddings (`embed_ln`).
        """
        owners = [
            (layer, label, component)
            for layer, block in enumerate(self.bridge.blocks)
            for label, component in block.named_children()
            if label in block.submodules and label != "mlp"
        ]
        around = {"embed_ln": -1, "ln_final": self.n_layers, "unembed": self.n_layers}
        owners += [(layer, label, getattr(self.bridge, label, None)) for label, layer in around.items()]
        groups = {(layer, label): _biases(component) for layer, label, component in owners}
        return {key: parameters for key, parameters in groups.items() if parameters}


def _biases(component: Any) -> list[Tensor]:
    if component is None:
        return []
    submodules = getattr(component, "submodules", {})
    # Where the bridge splits a fused projection into q, k and v, the fused one is no longer used.
    fused = [submodules["qkv"]] if {"qkv", "q"} <= submodules.keys() else []
    dead = {id(parameter) for module in fused for parameter in module.parameters()}
    return [p for name, p in component.named_parameters() if name.endswith("bias") and id(p) not in dead]
