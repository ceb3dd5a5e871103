"""A language model whose MLPs are written as features plus errors, and one prompt seen that way."""

import copy
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.frozen import FrozenModel
from transcoders._lazy import public
from transcoders.data.outliers import massive_tokens
from transcoders.dictionaries import DictionarySet, SparseFeatures, fitted, present_layers
from transcoders.dictionaries.provenance import has_other_weights, reading_as_trained
from transcoders.edits import after
from transcoders.errors import CheckFailedError, DictionaryError, InputError, ModelError
from transcoders.evaluation.statistics import unexplained
from transcoders.language_model import Hook, LanguageModel
from transcoders.sites import MLP_READS, MLP_WRITES, Site

logger = logging.getLogger(__name__)

BAD_FVU = 0.9
"""Dictionaries that leave this much unexplained hardly explain anything: they expect other numbers than they read."""
_NO_STREAM = ("attn_z", "mlp_neurons")
"""Sites whose vectors are heads side by side, or neurons."""


@dataclass(frozen=True)
class Trace:
    """One prompt through the local replacement model.

    At positions from `first` on, `write_l = Σ features + b_dec_l (+ read_l W_skip) + errors_l`, where `write_l` is what
    the MLP gives at the site that its dictionary writes, or what is at an autoencoder's site. Positions before have no
    features: there `errors_l` is all of it but the skip term, which is a path wherever it starts. At BOS it is the same
    for every prompt.
    `massive` positions have none either, in any layer: of the sum above they have all but the features.
    """

    tokens: Int[Tensor, "pos"]
    token_strings: tuple[str, ...]
    starts_with_bos: bool
    features: SparseFeatures
    errors: Float[Tensor, "layer pos d_model"]
    frozen: FrozenModel
    logits: Float[Tensor, "pos d_vocab"]
    first: int = 1
    """The first position with features."""
    massive: tuple[int, ...] = ()
    """Positions from `first` on whose activations exceed a limit of the dictionaries' training."""

    @property
    def exact(self) -> Bool[Tensor, "pos"]:
        """Positions without features, where errors hold what MLPs write."""
        exact = torch.arange(self.n_positions, device=self.tokens.device) < self.first
        exact[list(self.massive)] = True
        return exact

    @property
    def n_positions(self) -> int:
        return len(self.tokens)

    def with_logit_slope(self) -> "Trace":
        """The same where logits are read by how they change, as in graphs of linear response."""
        return replace(self, frozen=self.frozen.with_logit_slope())


@dataclass(frozen=True)
class Fit:
    """How dictionaries fit one prompt, over the positions with features, as means over the layers that have one."""

    l0: float
    """Active features per token of a layer."""
    fvu: float
    """`Σ ‖error‖² / Σ ‖write − mean write‖²`; NaN where there are fewer than two positions."""


class ReplacementModel:
    """A language model together with transcoders for its MLPs, or with autoencoders spliced in where they read.

    Transcoders read `mlp_in`, `mlp_normed` or `resid_mid` of a layer, and write `mlp_out` or `mlp_added`. A layer may
    be absent: then all of its MLP's output is error. An autoencoder writes what it reads, at any site but `attn_z` and
    `mlp_neurons`; the MLPs stay, and so does a site without one. Some layers may have transcoders and others
    autoencoders.
    `bos`: whether texts get BOS first; by default as in the dictionaries' training, or, where that is not known, as the
    model's own tokenizer does. `model` is the language model that reads them so.
    Raises `DictionaryError` for dictionaries of another size or frame, and for transcoders of other places.
    """

    def __init__(self, model: LanguageModel, dictionaries: DictionarySet, *, bos: bool | None = None) -> None:
        _check_sites(dictionaries, model)
        dictionaries = fitted(dictionaries, model)
        self.model = reading_as_trained(model, dictionaries.provenance, bos)
        same = dictionaries.decoder_bias(0).dtype is model.dtype
        self.dictionaries = dictionaries if same else copy.deepcopy(dictionaries).to(model.dtype)
        self.read_hooks = tuple(model.hook(site) for site in dictionaries.reads)
        """Of each layer, the hook that its dictionary reads."""
        self.write_hooks = tuple(model.hook(site) for site in dictionaries.writes)
        """Of each layer, the hook of the MLP's output that its dictionary reconstructs."""

    @property
    def spliced(self) -> tuple[int, ...]:
        """The layers whose dictionary reconstructs what it reads: autoencoders."""
        sites = zip(self.dictionaries.reads, self.dictionaries.writes, strict=True)
        return tuple(layer for layer, (read, write) in enumerate(sites) if read == write)

    @property
    def passed(self) -> tuple[int, ...]:
        """The layers without an autoencoder where others have one: nothing is put in the place of their site."""
        present = present_layers(self.dictionaries)
        return tuple(layer for layer in self.spliced if layer not in present)

    @property
    def written(self) -> tuple[int, ...]:
        """The layers where something is put in the place of what the model writes: all but those `passed`."""
        return tuple(layer for layer in range(self.model.n_layers) if layer not in self.passed)

    def stands_for(self, layer: int) -> str:
        """What the dictionary of a layer takes the place of: `mlp`, or the kind of its site."""
        return self.dictionaries.reads[layer].kind if layer in self.spliced else "mlp"

    @property
    def first(self) -> int:
        """The first position with features; what MLPs write before it is exact."""
        return self.dictionaries.provenance.first

    def exact(self, tokens: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
        """Positions without features: those before `first`, and those that exceed a limit of the training."""
        exact = massive_tokens(self.model, tokens[None], self.dictionaries.provenance.site_limits)[0]
        exact[: self.first] = True
        return exact

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | Path,
        transcoder_set: str | Path,
        *,
        backend: str = "transformerlens",
        lazy_decoder: bool = False,
        bos: bool | None = None,
        **how: Any,
    ) -> "ReplacementModel":
        """`load_model(model_name, **how)` with `load_dictionaries(transcoder_set)`, as users of circuit-tracer call it.

        `lazy_decoder`: decoders stay in their file. Raises `InputError` for another `backend` than TransformerLens.
        """
        if backend != "transformerlens":
            raise InputError(f"There is no backend {backend!r}; models run through 'transformerlens'.")
        model = public("circuitsae.load_model")(model_name, **how)
        decoders = "mapped" if lazy_decoder else "memory"
        dictionaries = public("circuitsae.load_dictionaries")(transcoder_set, device=model.device, decoders=decoders)
        return cls(model, dictionaries, bos=bos)

    def with_bos(self, bos: bool | None) -> "ReplacementModel":
        """This model, with texts read with BOS first or without; None leaves it as it is."""
        model = self.model.with_bos(bos)
        if model is self.model:
            return self
        other = copy.copy(self)
        other.model = model
        return other

    def tokens(self, prompt: str | Int[Tensor, "pos"], *, bos: bool | None = None) -> Int[Tensor, "pos"]:
        """Checked token ids; a text gets BOS first where `model` `adds_bos`, or as `bos` says."""
        if isinstance(prompt, str):
            return self.model.to_tokens(prompt, bos=bos)
        return self.model.check_tokens(prompt)

    @torch.no_grad()
    def trace(self, prompt: str | Int[Tensor, "pos"], *, bos: bool | None = None) -> Trace:
        """Features, errors and the frozen linear map of one prompt, from one forward pass."""
        tokens = self.tokens(prompt, bos=bos)
        dictionaries = self.dictionaries
        skips = [dictionaries.skip(layer) for layer in range(self.model.n_layers)]
        sites = {"reads": dictionaries.reads, "writes": dictionaries.writes}
        frozen = FrozenModel(self.model, tokens, skips, **sites, passed=self.passed)
        active = dictionaries.encode(frozen.reads.by_layer)
        exact = self.exact(tokens)
        keep = ~exact[active.index[:, 1]]
        features = SparseFeatures(active.index[keep], active.value[keep])
        _check_active(features)
        return Trace(
            tokens=tokens,
            token_strings=tuple(self.model.token_strings(tokens)),
            starts_with_bos=self.model.bos is not None and int(tokens[0]) == self.model.bos,
            features=features,
            errors=self._errors(frozen, features),
            frozen=frozen,
            logits=frozen.logits,
            first=self.first,
            massive=tuple(pos for pos in exact.nonzero().squeeze(1).tolist() if pos >= self.first),
        )

    @torch.no_grad()
    def keep(self, trace: Trace, rows: Int[Tensor, "k"]) -> Trace:
        """The trace with only these features, by number; what the others write counts as error where they write it."""
        features = SparseFeatures(trace.features.index[rows], trace.features.value[rows])
        return replace(trace, features=features, errors=self._errors(trace.frozen, features))

    def _errors(self, frozen: FrozenModel, features: SparseFeatures) -> Float[Tensor, "layer pos d_model"]:
        reads, first = frozen.reads.by_layer, self.first
        reconstruction = self.dictionaries.reconstruct(features, reads)
        reconstruction[:, :first] = frozen.skip_out(reads)[:, :first]
        return frozen.writes.mlp_out - reconstruction

    @torch.no_grad()
    def fit(self, trace: Trace) -> Fit:
        """L0 and FVU of the dictionaries on a prompt, layers without one left out."""
        present, with_features = present_layers(self.dictionaries), ~trace.exact
        written, errors = (x[present][:, with_features] for x in (trace.frozen.writes.mlp_out, trace.errors))
        n = written.shape[1]
        fvu = float(unexplained(written, errors).mean()) if n > 1 and present else math.nan
        return Fit(l0=len(trace.features.value) / max(1, n * len(present)), fvu=fvu)

    def check_fit(self, trace: Trace) -> Fit:
        """`fit`, with a line of the log where the weights are not known to be those of the dictionaries' training."""
        fit, other = self.fit(trace), has_other_weights(self.dictionaries.provenance, self.model)
        name, source = self.model.name, self.dictionaries.provenance
        if other:
            logger.warning(
                "The dictionaries of %s have L0 %.1f and FVU %.3f on this prompt in %s, whose weights are others.",
                source.model, fit.l0, fit.fvu, name,
            )  # fmt: skip
        if other is not False and fit.fvu > BAD_FVU:
            logger.warning(
                "The dictionaries leave %.2f of the variance of what they reconstruct in %s unexplained on this "
                "prompt: they are likely made for other weights or another scaling than the %r frame that was assumed.",
                fit.fvu, name, source.frame.name,
            )  # fmt: skip
        return fit

    @torch.no_grad()
    def run(
        self, tokens: Int[Tensor, "pos"], errors: Float[Tensor, "layer pos d_model"] | None = None
    ) -> Float[Tensor, "pos d_vocab"]:
        """Logits with every MLP replaced by its features, computed layer by layer from the stream that results.

        With the `errors` of the prompt's trace these are the model's own logits; without, those of the dictionaries
        alone (positions without features, and layers without a dictionary, keep the model's MLP output).
        """
        logits, _ = self.model.run(tokens[None], edits=self.edits(self.exact(tokens), errors))
        return logits[0]

    def logit_error(self, trace: Trace) -> float:
        """max |ℓ' − ℓ| / max |ℓ| of the logits ℓ' with the trace's errors and the model's own ℓ; rounding, or a bug.

        NaN for dictionaries that cannot run layer by layer (TopK over layers).
        """
        try:
            logits = self.run(trace.tokens, trace.errors)
        except DictionaryError:
            return math.nan
        error = float((logits - trace.logits).abs().max() / trace.logits.abs().max())
        if not math.isfinite(error):
            raise CheckFailedError(
                "The replacement model's logits are not finite numbers; look for weights or activations beyond the "
                "precision, and try --dtype float64."
            )
        return error

    def edits(
        self, exact: Bool[Tensor, "pos"], errors: Float[Tensor, "layer pos d_model"] | None = None
    ) -> dict[Site, Hook]:
        """Hooks for one forward pass that put features (and `errors`) in the place of every MLP's output.

        At the `exact` positions MLPs write what they do.
        """
        written: dict[int, Tensor] = {}
        dictionaries = self.dictionaries

        def read(layer: int) -> Hook:
            def encode(value: Tensor) -> None:
                decoded = dictionaries.decode_layer(layer, dictionaries.activations(layer, value))
                for at, layer_out in zip(dictionaries.write_layers(layer), decoded.unbind(-2), strict=True):
                    written[at] = written.get(at, dictionaries.decoder_bias(at)) + layer_out
                if (skip := dictionaries.skip(layer)) is not None:
                    written[layer] = written[layer] + value @ skip

            return encode

        def write(layer: int) -> Hook:
            def replace(mlp_out: Tensor) -> Tensor:
                out = written[layer] if errors is None else written[layer] + errors[layer]
                return torch.where(exact[:, None], mlp_out, out)

            return replace

        layers = range(self.model.n_layers) if errors is not None else present_layers(dictionaries)
        edits: dict[Site, Hook] = {}
        for i in (i for i in layers if i not in self.passed):
            edits[dictionaries.reads[i]] = read(i)
            edits[dictionaries.writes[i]] = after(read(i), write(i)) if i in self.spliced else write(i)
        return edits


def _check_sites(dictionaries: DictionarySet, model: LanguageModel) -> None:
    """Raises `DictionaryError` unless each stands for its layer's MLP, or for what it reads, at sites the model has."""
    for layer, (read, write) in enumerate(zip(dictionaries.reads, dictionaries.writes, strict=True)):
        of_mlp = read.kind in MLP_READS and write.kind in MLP_WRITES
        if not (of_mlp or read == write) or read.layer != layer or write.layer != layer:
            raise DictionaryError(
                f"Attribution needs transcoders, which read {', '.join(MLP_READS)} and write {' or '.join(MLP_WRITES)} "
                f"of each layer, or autoencoders, which write what they read; those of layer {layer} read {read} and "
                f"write {write}. Train with kind 'clt', 'plt' or 'sae'."
            )
        if read == write and read.kind in _NO_STREAM:
            raise DictionaryError(
                f"The autoencoder of layer {layer} reads {read}, which is no vector of the stream's width; graphs take "
                f"those of other sites than {' and '.join(_NO_STREAM)}."
            )
        if layer < model.n_layers:
            _require_site("read", read, model)
            _require_site("write", write, model)
    for layer in range(dictionaries.n_layers):
        if (norm := dictionaries.norm(layer)) is not None:
            raise DictionaryError(
                f"The dictionary of layer {layer} reads each token in units of its own ({norm}), which attribution "
                "does not carry through; it needs dictionaries without such a norm."
            )


def _require_site(side: str, site: Site, model: LanguageModel) -> None:
    try:
        model.hook(site)
    except ModelError as error:
        raise DictionaryError(f"The dictionaries {side} {site}, but {error}") from error


def _check_active(active: SparseFeatures) -> None:
    wrong = (~torch.isfinite(active.value)).nonzero()
    if len(wrong):
        layer, pos, feature = active.index[wrong[0, 0]].tolist()
        raise DictionaryError(
            f"Feature {layer}.{feature} is not finite at position {pos} ({float(active.value[wrong[0, 0]])}); "
            "check the dictionary's weights for such values, or use a wider dtype such as float32."
        )
