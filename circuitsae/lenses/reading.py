"""The stream between the blocks, and the logits that a model's end makes of it."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

ROWS_AT_ONCE = 256
"""Of how many tokens logits are held together."""
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def lens_logits(
    model: LanguageModel, stream: Float[Tensor, "row d_model"], at_once: int = ROWS_AT_ONCE
) -> Iterator[Float[Tensor, "_ d_vocab"]]:
    """The logits that the final norm and the unembedding make of a stream, some rows at a time."""
    norm = model.parts.final_norm
    for rows in stream.split(at_once):
        yield model.logits_of(rows if norm is None else norm(rows[None])[0])


@torch.no_grad()
def streams_of(
    model: LanguageModel, tokens: Int[Tensor, "row pos"]
) -> tuple[Float[Tensor, "row pos d_vocab"], Float[Tensor, "state row pos d_model"]]:
    """The model's logits, and the stream before block 0 and after each block."""
    sites = [Site(0, "resid_pre"), *(Site(layer, "resid_post") for layer in range(model.n_layers))]
    logits, at = model.run(tokens, sites)
    return logits, torch.stack([at[site] for site in sites])


def check_last(
    model: LanguageModel, stream: Float[Tensor, "row d_model"], logits: Float[Tensor, "row d_vocab"]
) -> None:
    """Raises `ModelError` unless the stream after the last block gives the model's own logits."""
    ours = torch.cat(list(lens_logits(model, stream)))
    error = float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-30))
    if not error <= _TOLERANCE.get(model.dtype, 5e-2):
        raise ModelError(
            f"The final norm and the unembedding of {model.name} make logits of the last stream that differ from its "
            f"own by {error:.1e} (relative); a lens is not supported for its architecture."
        )
