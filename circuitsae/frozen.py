"""What is left of a model on one prompt when attention patterns and norm scales are held at their clean values.

Then everything that is written into the residual stream (embeddings, MLP outputs, biases) reaches every read
site and the final norm by a linear map. This module runs that map forward, through the real model's own modules,
so that nothing has to be re-implemented per architecture.
"""

import copy
from collections.abc import Callable, Container, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.patterns import (
    PATTERN_BYTES,
    RecomputedPatterns,
    pattern_bytes,
    pattern_hook,
    stream_hooks,
    when_needed,
)
from transcoders.edits import after
from transcoders.errors import ModelError
from transcoders.held import EMBED, held_hooks
from transcoders.language_model import Hook, LanguageModel
from transcoders.sites import MLP_WRITES, Site

_POSITION, _FINAL, _RAW = "pos_embed.hook_out", "unembed.hook_in", "unembed.hook_out"


@dataclass(frozen=True)
class Writes:
    """Everything the residual stream receives on one prompt besides attention: the inputs of the linear map."""

    embed: Float[Tensor, "pos d_model"]
    position: Float[Tensor, "pos d_model"] | None
    mlp_out: Float[Tensor, "layer pos d_model"]
    """What each layer's MLP gives, at the site that its dictionary writes."""


@dataclass(frozen=True)
class Reads:
    """Everything that is read from the residual stream: the outputs of the linear map."""

    by_layer: Float[Tensor, "layer pos d_model"]
    """What each layer's dictionary reads."""
    final: Float[Tensor, "pos d_model"]
    """After the final norm; logits = final W_U (+ b_U)."""


Answer = Callable[[int, Sequence[Float[Tensor, "pos d_model"]]], Float[Tensor, "pos d_model"]]
"""What is written at a layer in answer to what was read at all layers up to it."""


class FrozenModel:
    """A language model on one prompt, linear in its `Writes`.

    `logit_scale` is what stands between the unembedding and the logits of the last position (1, or a soft cap's
    `c tanh(z/c) / z`), one constant for each token.
    `reads[l]` and `writes[l]` are the sites that the dictionary of layer l reads and writes, by default the MLP's ends.
    `skips[l]` is its W_skip: a linear path past the MLP, `write += read W_skip`, live at every position.
    A layer in `passed` has no dictionary and nothing in its place: what it would write is left as it comes.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "pos"],
        skips: Sequence[Float[Tensor, "d_in d_out"] | None] = (),
        *,
        reads: Sequence[Site] = (),
        writes: Sequence[Site] = (),
        passed: Container[int] = (),
    ) -> None:
        self.model = model
        self.passed = passed
        self.tokens = tokens
        self.skips = list(skips) or [None] * model.n_layers
        self.answer: Answer | None = None
        layers = range(model.n_layers)
        self.read_sites = tuple(reads) or tuple(Site(layer, "mlp_in") for layer in layers)
        self.write_sites = tuple(writes) or tuple(Site(layer, "mlp_out") for layer in layers)
        self._read_names = [model.hook(site) for site in self.read_sites]
        self._write_names = [model.hook(site) for site in self.write_sites]
        self._record()

    @cached_property
    def recomputed(self) -> int:
        """Bytes of a layer's pattern, which is computed whenever it is asked for; 0 where those of all are held."""
        one = pattern_bytes(self.model, len(self.tokens))
        return one if one * self.model.n_layers > PATTERN_BYTES else 0

    def _record(self) -> None:
        """One clean run: patterns, scales, reads and writes."""
        patterns = [pattern_hook(layer) for layer in range(self.model.n_layers)]
        scales = [name for name in held_hooks(self.model) if name not in patterns]
        names = [*self._read_names, *self._write_names, EMBED, _FINAL, _RAW, *patterns, *scales]
        has_position = self.model.has_hook(_POSITION)
        self._check_calls(names, self.model.hook_names)
        after_first = Site(0, "resid_post").hooks[0]
        streams = stream_hooks(self.model) if self.recomputed else {}
        optional = [after_first] * self.model.has_hook(after_first) + [_POSITION] * has_position + [*streams.values()]
        middles = {
            layer: _around(self.model, layer) for layer, s in enumerate(self.write_sites) if s.kind == "resid_mid"
        }
        optional += [name for around in middles.values() for name in around]
        if self.recomputed:
            names = [name for name in names if name not in patterns[:-1]]
        logits, cache = self._clean_run([*names, *optional])
        self._check_calls(names, cache)
        for name in (EMBED, _FINAL):
            if cache[name].shape[-1] != self.model.d_model:
                raise ModelError(
                    f"{self.model.name} has {cache[name].shape[-1]} dimensions at {name} and {self.model.d_model} in "
                    "its residual stream; attribution does not support a projection between them."
                )
        if (
            self.write_sites[0].kind in MLP_WRITES
            and after_first in cache
            and torch.equal(cache[self._write_names[0]], cache[after_first])
        ):
            raise ModelError(
                f"The MLPs of {self.model.name} return the residual stream and not what they add to it; "
                "its architecture is not supported."
            )
        for layer, around in middles.items():
            check_middle(self.model, layer, *(cache[name] for name in (*around, self._write_names[layer])))
        self.constants: MutableMapping[str, Tensor]
        if self.recomputed:
            held, before = {name: cache[name] for name in scales}, {at: cache[name] for at, name in streams.items()}
            last = cache.pop(patterns[-1])[:, :, -1].clone()
            self.constants = RecomputedPatterns(self.model, self.tokens, held, before, last)
        else:
            self.constants = {name: cache[name].detach() for name in held_hooks(self.model)}
        self.logits: Float[Tensor, "pos d_vocab"] = logits[0]
        raw = cache[_RAW][0, -1]
        self.logit_scale: Float[Tensor, "d_vocab"] = torch.where(raw == 0, 1, self.logits[-1] / raw)
        position = cache[_POSITION].expand(1, len(self.tokens), -1)[0] if has_position else None
        read, written = (torch.cat([cache[name] for name in names]) for names in (self._read_names, self._write_names))
        self.writes = Writes(cache[EMBED][0], position, written)
        self.reads = Reads(read, cache[_FINAL][0])
        self._check_finite()

    def _check_finite(self) -> None:
        in_order = [("The embedding", self.writes.embed)]
        for layer, (read, written) in enumerate(zip(self.reads.by_layer, self.writes.mlp_out, strict=True)):
            if (site := self.read_sites[layer]) == self.write_sites[layer]:
                in_order += [(f"What stands at {site}", read)]
            else:
                in_order += [(f"What MLP {layer} reads", read), (f"What MLP {layer} writes", written)]
        in_order += [("What the unembedding reads", self.reads.final)]
        for what, values in in_order:
            check_finite(f"{what} in {self.model.name}", values, self.tokens)

    @torch.no_grad()
    def _clean_run(self, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self.model.run_hooked(self.tokens[None], read=names)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{self.model.name} does not run through TransformerLens' bridge ({reason}); "
                "its architecture is not supported."
            ) from error

    def _check_calls(self, wanted: Iterable[str], called: Container[str]) -> None:
        for name in wanted:
            if name not in called:
                raise ModelError(
                    f"{self.model.name} never calls {name}, which attribution reads or freezes; "
                    "its architecture is not supported."
                )

    def __call__(self, writes: Writes) -> Reads:
        """The reads that `writes` produce; differentiable in `writes` and in the model's biases.

        `writes.mlp_out` excludes the skip term, which is computed from the reads of the same run.
        """
        read, final = self.apart(writes.embed, writes.position, writes.mlp_out.unbind())
        return Reads(torch.stack(read), final)

    def apart(
        self,
        embed: Float[Tensor, "pos d_model"],
        position: Float[Tensor, "pos d_model"] | None,
        written: Sequence[Float[Tensor, "pos d_model"]],
    ) -> tuple[list[Float[Tensor, "pos d_model"]], Float[Tensor, "pos d_model"]]:
        """The same with a tensor for each layer, so that a derivative goes no further down than what it is of."""
        read: list[Tensor] = []
        edits: dict[str, Hook] = {name: _constant(when_needed(self.constants, name)) for name in self.constants}
        edits[EMBED] = lambda _: embed[None]
        if position is not None:
            edits[_POSITION] = lambda _: position[None]
        for layer, name in enumerate(self._write_names):
            record, write = _recorded(read), self._written(layer, written, read)
            if layer in self.passed or name != self._read_names[layer]:
                edits[self._read_names[layer]] = record
            if layer not in self.passed:
                # A stream in the middle is written by what attention adds, so that it stays in the stream.
                both = write if name != self._read_names[layer] else after(record, write)
                edits |= self.model.writing(self.write_sites[layer], both)
        _, cache = self.model.run_hooked(self.tokens[None], read=[_FINAL], write=edits)
        return read, cache[_FINAL][0]

    def _written(self, layer: int, written: Sequence[Tensor], read: Sequence[Tensor]) -> Hook:
        if self.answer is None:
            return lambda _: (written[layer] + self._skip(layer, read[layer]))[None]
        answer = self.answer
        return lambda mlp_out: written[layer] + mlp_out - answer(layer, read)

    def responding(self, answer: "Answer") -> "FrozenModel":
        """The same run where each MLP writes what it makes of its read, but for `answer`, besides what is written."""
        other = self.without_skips()
        other.answer = answer
        return other

    def live(self) -> "FrozenModel":
        """The same run where patterns and norm scales answer to what is written: no linear map, but differentiable."""
        other = copy.copy(self)
        other.constants = {}
        return other

    def with_logit_slope(self) -> "FrozenModel":
        """The same constants, where `logit_scale` is how each logit changes with what W_U gives: of a soft cap the
        derivative `1 − (logit / c)²` in the place of the secant.
        """
        other, cap = copy.copy(self), self.model.parts.logit_cap
        if cap is not None:
            other.logit_scale = 1 - (self.logits[-1] / cap) ** 2
        return other

    def without_skips(self) -> "FrozenModel":
        """The same constants, where nothing passes by a skip term: another map, which the clean run is no part of."""
        other = copy.copy(self)
        other.skips = [None] * len(self.skips)
        return other

    def skip_out(self, read: Float[Tensor, "layer pos d_model"]) -> Float[Tensor, "layer pos d_model"]:
        """What the skip terms write, given what the dictionaries read."""
        return torch.stack([self._skip(layer, value) for layer, value in enumerate(read)])

    def _skip(self, layer: int, read: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        W_skip = self.skips[layer]
        return torch.zeros_like(read) if W_skip is None else read @ W_skip


def check_finite(what: str, values: Float[Tensor, "pos _"], tokens: Int[Tensor, "pos"]) -> None:
    """Raises `ModelError` with the first position whose values are not all finite."""
    finite = torch.isfinite(values).all(-1)
    if not finite.all():
        pos = int((~finite).nonzero()[0])
        value = float(values[pos][~torch.isfinite(values[pos])][0])
        raise ModelError(
            f"{what} at position {pos} (token {int(tokens[pos])}) is not finite ({value}), so nothing can be "
            "attributed; check the weights for such values, or load the model in a wider dtype such as float32."
        )


def check_middle(
    model: LanguageModel, layer: int, before: Float[Tensor, "*n"], added: Float[Tensor, "*n"], mid: Float[Tensor, "*n"]
) -> None:
    """Raises `ModelError` where `resid_mid` is not what comes into the block plus what attention adds."""
    if not torch.allclose(before + added, mid, rtol=1e-3, atol=1e-3 * float(mid.abs().max())):
        raise ModelError(
            f"The stream of {model.name} between attention and MLP of layer {layer} is not the sum of "
            "the block's input and what attention adds; change resid_pre or attn_added instead."
        )


def _around(model: LanguageModel, layer: int) -> tuple[str, str]:
    """The hooks of the stream before a block and of what attention adds to it."""
    return model.hook(Site(layer, "resid_pre")), model.hook(Site(layer, "attn_added"))


def _constant(value: Callable[[], Tensor]) -> Hook:
    return lambda _: value()


def _recorded(values: list[Tensor]) -> Hook:
    """Notes what comes by, of one prompt."""
    return lambda value: values.append(value[0])
