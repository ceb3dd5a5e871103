"""A language model whose MLPs are written as features plus errors, and one prompt seen that way."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.frozen import FrozenModel
from transcoders.dictionaries import DictionarySet, SparseFeatures
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import CheckFailedError, DictionaryError, InputError
from transcoders.language_model import Hook, LanguageModel
from transcoders.sites import Site

FIRST = 1
"""First position with features. Position 0 is an attention sink with outlier activations in most models."""


@dataclass(frozen=True)
class Trace:
    """One prompt through the local replacement model.

    At positions from `FIRST` on, `mlp_out_l = Σ features + b_dec_l (+ mlp_in_l W_skip) + errors_l`. Position 0 has no
    features: there `errors_l` is all of the MLP's output but the skip term, which is a path wherever it starts; after
    BOS it is the same for every prompt.
    """

    tokens: Int[Tensor, "pos"]
    token_strings: tuple[str, ...]
    starts_with_bos: bool
    features: SparseFeatures
    errors: Float[Tensor, "layer pos d_model"]
    frozen: FrozenModel
    logits: Float[Tensor, "pos d_vocab"]

    @property
    def n_positions(self) -> int:
        return len(self.tokens)


class ReplacementModel:
    """A language model together with transcoders for all of its MLPs.

    `bos`: whether texts get BOS first; by default as in the dictionaries' training, or, where that is not known, as the
    model's own tokenizer does. `model` is the language model that reads them so.
    Raises `DictionaryError` for dictionaries of another model, width or frame, and for sets that are no transcoders.
    """

    def __init__(self, model: LanguageModel, dictionaries: DictionarySet, *, bos: bool | None = None) -> None:
        layers = range(dictionaries.n_layers)
        mlp_in, mlp_out = (tuple(Site(i, "mlp_in") for i in layers), tuple(Site(i, "mlp_out") for i in layers))
        if (dictionaries.reads, dictionaries.writes) != (mlp_in, mlp_out):
            raise DictionaryError(
                f"Attribution needs transcoders, which read mlp_in and write mlp_out of every layer; these read "
                f"{dictionaries.reads[0]} and write {dictionaries.writes[0]}. Train with kind 'clt' or 'plt'."
            )
        dictionaries.check_fits(model)
        self.model = reading_as_trained(model, dictionaries.provenance, bos)
        same = dictionaries.decoder_bias(0).dtype is model.dtype
        self.dictionaries = dictionaries if same else copy.deepcopy(dictionaries).to(model.dtype)

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
        from circuitsae.loading import load_dictionaries, load_model

        if backend != "transformerlens":
            raise InputError(f"There is no backend {backend!r}; models run through 'transformerlens'.")
        model = load_model(model_name, **how)
        decoders = "mapped" if lazy_decoder else "memory"
        return cls(model, load_dictionaries(transcoder_set, device=model.device, decoders=decoders), bos=bos)

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
        frozen = FrozenModel(self.model, tokens, skips)
        active = dictionaries.encode(frozen.reads.mlp_in)
        keep = active.index[:, 1] >= FIRST
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
        )

    @torch.no_grad()
    def keep(self, trace: Trace, rows: Int[Tensor, "k"]) -> Trace:
        """The trace with only these features, by number; what the others write counts as error where they write it."""
        features = SparseFeatures(trace.features.index[rows], trace.features.value[rows])
        return replace(trace, features=features, errors=self._errors(trace.frozen, features))

    def _errors(self, frozen: FrozenModel, features: SparseFeatures) -> Float[Tensor, "layer pos d_model"]:
        reconstruction = self.dictionaries.reconstruct(features, frozen.reads.mlp_in)
        reconstruction[:, :FIRST] = frozen.skip_out(frozen.reads.mlp_in)[:, :FIRST]
        return frozen.writes.mlp_out - reconstruction

    @torch.no_grad()
    def run(
        self, tokens: Int[Tensor, "pos"], errors: Float[Tensor, "layer pos d_model"] | None = None
    ) -> Float[Tensor, "pos d_vocab"]:
        """Logits with every MLP replaced by its features, computed layer by layer from the stream that results.

        With the `errors` of the prompt's trace these are the model's own logits; without, those of the dictionaries
        alone (position 0 keeps the model's MLP output).
        """
        logits, _ = self.model.run(tokens[None], edits=self.edits(errors))
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

    def edits(self, errors: Float[Tensor, "layer pos d_model"] | None = None) -> dict[Site, Hook]:
        """Hooks for one forward pass that put features (and `errors`) in the place of every MLP's output."""
        written: dict[int, Tensor] = {}
        dictionaries = self.dictionaries

        def read(layer: int) -> Hook:
            def encode(mlp_in: Tensor) -> None:
                decoded = dictionaries.decode_layer(layer, dictionaries.activations(layer, mlp_in))
                for at, layer_out in zip(dictionaries.write_layers(layer), decoded.unbind(-2), strict=True):
                    written[at] = written.get(at, dictionaries.decoder_bias(at)) + layer_out
                if (skip := dictionaries.skip(layer)) is not None:
                    written[layer] = written[layer] + mlp_in @ skip

            return encode

        def write(layer: int) -> Hook:
            def replace(mlp_out: Tensor) -> Tensor:
                out = written[layer] if errors is None else written[layer] + errors[layer]
                return torch.cat([mlp_out[:, :FIRST], out[:, FIRST:]], dim=1)

            return replace

        layers = range(self.model.n_layers)
        return {Site(i, "mlp_in"): read(i) for i in layers} | {Site(i, "mlp_out"): write(i) for i in layers}


def _check_active(active: SparseFeatures) -> None:
    wrong = (~torch.isfinite(active.value)).nonzero()
    if len(wrong):
        layer, pos, feature = active.index[wrong[0, 0]].tolist()
        raise DictionaryError(
            f"Feature {layer}.{feature} is not finite at position {pos} ({float(active.value[wrong[0, 0]])}); "
            "check the dictionary's weights for such values, or use a wider dtype such as float32."
        )
