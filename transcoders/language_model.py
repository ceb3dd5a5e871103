"""LanguageModel: the adapter over TransformerLens' `TransformerBridge`."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders._lazy import public
from transcoders.bridge import TransformerBridge, fit_precision, prepare, remembered
from transcoders.edits import Hook, after, apart, by_token, in_the_middle
from transcoders.errors import ModelError, PromptError
from transcoders.files import short_hash
from transcoders.model_parts import ModelParts, kept_apart, one_text
from transcoders.precision import Precision, as_dtype
from transcoders.sites import Frame, Site, SiteKind
from transcoders.token_text import token_text, with_characters

_FINGERPRINT_VALUES = 4096
_FINAL = "unembed.hook_in"
"""What the unembedding reads, as TransformerBridge calls it."""
_MISSING: dict[SiteKind, str] = {
    "resid_mid": "its attention and MLP run side by side",
    "mlp_normed": "no norm stands before its MLP",
    "mlp_neurons": "its MLP is a mixture of experts",
}
"""Why a model may lack a site."""


def _sampled(weights: Sequence[tuple[str, Tensor]]) -> Iterator[bytes | str]:
    for name, weight in weights:
        values = weight.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _FINGERPRINT_VALUES)]
        yield f"{name}{tuple(weight.shape)}"
        yield sample.to("cpu", torch.float32).numpy().tobytes()


class _AllFound(Exception):  # noqa: N818 - no error: how a forward pass is left early
    """Raised in a hook once everything asked for has been read."""


class LanguageModel:
    """A decoder-only language model: text or tokens in, logits and named activations out.

    Holds no hooks between calls; its weights do not require gradients.
    """

    origin: Mapping[str, str]
    """What `name` leaves out of where the weights come from: their `revision`, an `adapter`, their `quantisation`."""
    place: str | None = None
    """What loads it again: a hub name, or the full path of a folder; None for a model that was in memory."""
    _bos: bool | None = None  # whether texts get BOS first, where `with_bos` said so

    def __init__(
        self,
        bridge: TransformerBridge,
        name: str,
        frame: Frame = Frame(),
        *,
        tokenizer: Any = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        """`tokenizer`: the model's own; the bridge's, which is used without, is made to add BOS."""
        self.bridge = bridge
        self._tokenizer = tokenizer
        self.name = name
        self.origin = dict(origin or {})
        self.frame = frame
        bridge.eval()
        bridge.requires_grad_(False)
        prepare(bridge)
        self.parts = ModelParts(bridge)

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None, **how: Any) -> "LanguageModel":
        """`transcoders.load_model(name, **how)`, under the name that users of TransformerLens know."""
        return public("transcoders.load_model")(name, **how)

    boot_transformers = from_pretrained  # TransformerLens' newer name for the same

    n_layers = property(lambda self: int(self.bridge.cfg.n_layers), doc="Number of blocks.")
    n_heads = property(lambda self: int(self.bridge.cfg.n_heads), doc="Attention heads of a block.")
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
    def tokenizer(self) -> Any:
        """What cuts texts into tokens, or None."""
        return self.bridge.tokenizer if self._tokenizer is None else self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, or None where the model has none."""
        owner = self.tokenizer if self.has_tokenizer else self.parts.config
        return getattr(owner, "bos_token_id", None)

    @property
    def adds_bos(self) -> bool:
        """Whether texts get BOS first: as `with_bos` says, by default as the model's own tokenizer does."""
        if self._bos is not None or self.bos is None or not self.has_tokenizer:
            return bool(self._bos)
        return list(self.tokenizer("a")["input_ids"])[:1] == [self.bos]

    @property
    def bridge_adds_bos(self) -> bool:
        """Whether TransformerLens puts BOS first where nothing is said."""
        return bool(self.bridge.cfg.default_prepend_bos)

    @property
    def bos_is_chosen(self) -> bool:
        """Whether `with_bos` said how texts are read."""
        return self._bos is not None

    def with_bos(self, bos: bool | None) -> "LanguageModel":
        """The same model, with texts read with BOS first or without; None leaves it as it is.

        Raises `PromptError` where the model has no such token to put first.
        """
        if bos is None or bos == self._bos:
            return self
        if bos and self.bos is None:
            raise PromptError(
                f"{self.name} has no beginning-of-text token to put before a text; leave out bos=True (--bos)."
            )
        other = copy.copy(self)
        other._bos = bos
        return other

    def to(self, dtype: Precision) -> "LanguageModel":
        """This model, converted in place to another precision."""
        self.bridge.to(as_dtype(dtype))
        fit_precision(self.bridge)
        return self

    def fingerprint(self) -> str:
        """A short hash of the weights (names, shapes, and up to 4,096 evenly spaced values of each).

        It is remembered until a weight changes; changes through `.data` and in inference mode go unseen.
        """
        weights = self.parts.weights()
        return remembered(self.bridge, (weight for _, weight in weights), lambda: short_hash(_sampled(weights)))

    # text and tokens

    def to_tokens(self, text: str, *, bos: bool | None = None) -> Int[Tensor, "pos"]:
        """Token ids of `text`, with BOS first where the model `adds_bos`, or as `bos` says.

        Raises `PromptError` for an empty text, or one longer than the context.
        """
        if not text:
            raise PromptError("The prompt is empty (''); give some text.")
        ids = self.with_bos(bos).begun(self._encode(text))
        return self.check_tokens(torch.tensor(ids, device=self.device))

    def begun(self, ids: list[int]) -> list[int]:
        """The ids of a text as the model is to read them: after BOS where it `adds_bos`, and never after two."""
        return [self.bos, *ids] if self.adds_bos and self.bos is not None and ids[:1] != [self.bos] else ids

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
            piece = self.tokenizer.get_vocab().get(text.replace(" ", "\u2581"))
            ids = ids if piece is None else [piece]
        if len(ids) != 1:
            pieces = [self.token_string(i) for i in ids]
            raise PromptError(
                f"{text!r} is {len(ids)} tokens ({pieces}) in {self.name}, not one; "
                "give a single token (mind the leading space)."
            )
        return ids[0]

    def token_string(self, token: int) -> str:
        """The text of one token, leading space included; `#id` where the tokenizer knows none, or is none.

        A token that is part of a character is written with its bytes, such as `<0xF0><0x9F>`.
        """
        piece = self.tokenizer.convert_ids_to_tokens(int(token)) if self.has_tokenizer else None
        if piece is None:  # vocabularies are padded to even sizes
            return f"#{token}"
        # SentencePiece writes spaces as U+2581; `decode` of a single id would drop one at its start.
        if isinstance(piece, str) and "\u2581" in piece:
            return piece.replace("\u2581", " ")
        return token_text(str(piece), self.tokenizer.decode([int(token)], clean_up_tokenization_spaces=False))

    def token_strings(self, tokens: Int[Tensor, "pos"]) -> list[str]:
        """One string per position; the parts of one character name it beside their bytes (see `token_text`)."""
        return with_characters([self.token_string(int(t)) for t in tokens])

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.tokenizer is not None and self.tokenizer.vocab_size)

    def _encode(self, text: str) -> list[int]:
        if not self.has_tokenizer:
            raise PromptError(
                f"{self.name} has no tokenizer; give token ids instead of the text {text[:40]!r}, or load the model "
                "with tokenizer=…."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"The text {text[:80]!a} has bytes that are not UTF-8; give it in UTF-8 (see the terminal's encoding)."
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    # running

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Iterable[Site] = (),
        edits: Mapping[Site, Hook] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[Site, Float[Tensor, "batch pos _"]]]:
        """Logits and the activations at `sites`, with the activations at `edits` replaced by what the hooks return.

        Hooks, too, take and give one vector per token (heads side by side); what is written at `resid_mid` stays in
        the stream. Raises `ModelError` as `hook` does.
        """
        names = {site: self.hook(site) for site in sites}
        logits, cache = self.run_hooked(tokens, read=dict.fromkeys(names.values()), write=self._edits(edits or {}))
        return logits, {site: cache[name].flatten(2) for site, name in names.items()}

    def _edits(self, edits: Mapping[Site, Hook]) -> dict[str, Hook]:
        """Edits of sites by hook, in the hooks' own shapes."""
        write: dict[str, Hook] = {}
        # A stream in the middle is changed last, by what attention adds once that has been changed itself.
        for site, edit in sorted(edits.items(), key=lambda item: item[0].kind == "resid_mid"):
            for name, hook in self.writing(site, edit).items():
                hook = by_token(hook)
                write[name] = hook if name not in write else after(write[name], hook)
        return write

    def run_to_unembedding(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Iterable[Site] = (),
        edits: Mapping[Site, Hook] | None = None,
        *,
        start: int = 0,
        stream: Float[Tensor, "batch pos d_model"] | None = None,
        held: Mapping[str, Hook] = MappingProxyType({}),
        past: Any = None,
    ) -> tuple[Float[Tensor, "batch pos _"], dict[Site, Float[Tensor, "batch pos _"]]]:
        """As `run`, with what the unembedding reads in the place of logits, which `logits_of` makes of it.

        With `stream`, the stream before block `start`, that runs first. `held`: edits by hooks; `past`: `run_hooked`'s.
        """
        final: list[Tensor] = []

        def stop(value: Tensor) -> None:
            final.append(value)
            raise _AllFound

        cache: dict[str, Tensor] = {}
        names = {site: self.hook(site) for site in sites}
        write = self._edits(edits or {}) | {**held, _FINAL: stop}
        hooks = self._hooks(tokens, dict.fromkeys(names.values()), write, cache)
        kept = {"past_key_values": past, "use_cache": True} if past is not None else self.parts.without_cache
        with contextlib.suppress(_AllFound), one_text(), self.parts.passed_over(0 if stream is None else start, stream):
            self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False, **kept)
        return final[0], {site: cache[name].flatten(2) for site, name in names.items()}

    def logits_of(self, final: Float[Tensor, "row _"]) -> Float[Tensor, "row d_vocab"]:
        """The logits of what the unembedding reads, through whatever soft cap or factor the model has behind it."""
        tokens = torch.zeros(len(final), 1, dtype=torch.long, device=self.device)
        with self.parts.passed_over(self.n_layers):
            logits, _ = self.run_hooked(tokens, write={_FINAL: lambda value: final.reshape(value.shape)})
        return logits[:, 0]

    def activations(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Iterable[Site],
        *,
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> dict[Site, Float[Tensor, "batch pos _"]]:
        """The activations at `sites`; nothing after the last of them is computed. `positions`: as of `visit`."""
        found: dict[Site, Tensor] = {}
        self.visit(tokens, sites, found.__setitem__, positions=positions)
        return found

    def visit(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Iterable[Site],
        see: Callable[[Site, Tensor], None],
        *,
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Give `see` each site's activations `[batch, pos, width]` as one forward pass comes to it, keeping none.

        Nothing after the last of the sites is computed. `positions`: where each token stands in its text, of which a
        row then holds several, each beginning at 0, and none sees another; not every model obeys. Raises `ModelError`
        as `hook` does.
        """
        home = self.device
        named: dict[str, list[Site]] = {}
        for site in sites:
            named.setdefault(self.hook(site), []).append(site)
        left = set(named)

        def show(value: Tensor, hook: Any) -> None:
            left.discard(hook.name)
            for site in named[hook.name]:
                see(site, apart(value.to(home), tokens).flatten(2))
            if not left:
                raise _AllFound

        if named:
            hooks: list[tuple[Any, Any]] = [(name, show) for name in named]
            texts = {} if positions is None else kept_apart(positions, self.dtype)
            with contextlib.suppress(_AllFound):
                self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False, **texts)

    def writing(self, site: Site, edit: Hook) -> dict[str, Hook]:
        """The hooks that edit a site."""
        if site.kind != "resid_mid":
            return {self.hook(site): edit}
        self.hook(site)  # parallel blocks have none
        before, added = (self.hook(Site(site.layer, kind)) for kind in ("resid_pre", "attn_added"))
        note, change = in_the_middle(edit)
        return {before: note, added: change}

    def run_hooked(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        read: Iterable[str] = (),
        write: Mapping[str, Hook] | None = None,
        past: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`run` in terms of TransformerBridge hook names; writes are applied before reads.

        Values are the bridge's, heads apart; only where it has one axis of all tokens (OPT's second norm, routers of
        experts) it is taken apart into batch and position. Of a model that is spread over devices, what is read and
        what edits get is on the one of the unembedding.
        `past` (of `new_cache`) holds the keys and values of earlier positions, and takes those of `tokens`.
        """
        cache: dict[str, Tensor] = {}
        hooks = self._hooks(tokens, read, write or {}, cache)
        kept = {} if past is None else {"past_key_values": past, "use_cache": True}
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False, **kept)
        return logits.to(self.device), cache

    def _hooks(
        self, tokens: Int[Tensor, "batch pos"], read: Iterable[str], write: Mapping[str, Hook], cache: dict[str, Tensor]
    ) -> list[tuple[Any, Any]]:
        """The bridge's hooks that edit as `write` says, and then put into `cache` what is at `read`."""
        home = self.device
        writers = [(name, partial(_change, edit, tokens, home)) for name, edit in write.items()]
        return writers + [(name, partial(_store, cache, name, tokens, home)) for name in read]

    def new_cache(self) -> Any:
        """An empty cache of keys and values for `run_hooked`."""
        return self.parts.new_cache()

    def hook(self, site: Site) -> str:
        """TransformerBridge's name of the hook that carries a site; one name where two sites are one place.

        Raises `ModelError` where the model has no such site.
        """
        hooks = self.bridge.hook_dict
        if there := [name for name in site.hooks if name in hooks]:
            return str(hooks[there[0]].name)
        if site.layer >= self.n_layers:
            raise ModelError(f"There is no site {site}; {self.name} has layers 0 to {self.n_layers - 1}.")
        kinds = [kind for kind in get_args(SiteKind) if self.has_site(Site(site.layer, kind))]
        reason = _MISSING.get(site.kind, f"TransformerLens' bridge has no {site.hooks[0]}")
        raise ModelError(f"{self.name} has no site {site} ({reason}); its sites there are {', '.join(kinds)}.")

    def has_site(self, site: Site) -> bool:
        return any(self.has_hook(name) for name in site.hooks)

    def width(self, site: Site) -> int:
        """Length of the vectors at a site; raises `ModelError` as `hook` does."""
        if site.kind not in ("attn_z", "mlp_neurons"):
            return self.d_model
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.activations(token, [site])[site].shape[-1]

    def has_hook(self, name: str) -> bool:
        return name in self.bridge.hook_dict

    @property
    def hook_names(self) -> tuple[str, ...]:
        """TransformerLens' names of every place that can be read and written."""
        return tuple(self.bridge.hook_dict)

    def bias_groups(self) -> dict[tuple[int, str], list[Tensor]]:
        """The additive parameters outside the MLPs, each once, by (layer, component).

        Components carry TransformerBridge's names: `ln1`, `attn`, `ln2` of a block; then, as layer `n_layers`, what
        follows the blocks (`ln_final`, `unembed`), and as layer -1 a norm of the embeddings (`embed_ln`).
        """
        return self.parts.bias_groups()


def _store(cache: dict[str, Tensor], name: str, tokens: Tensor, home: torch.device, value: Tensor, hook: Any) -> None:
    """Keep what one of the bridge's hooks carries."""
    cache[name] = apart(value, tokens).to(home)


def _change(edit: Hook, tokens: Tensor, home: torch.device, value: Tensor, hook: Any) -> Tensor | None:
    """What an edit makes of what one of the bridge's hooks carries, in its shape and on its device."""
    changed = edit((whole := apart(value, tokens)).to(home))
    if changed is not None and whole is not value:
        changed = changed.reshape(value.shape)
    return None if changed is None else changed.to(value.device)
