"""Language models from a folder or from the hub."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.hf_utils import autotokenizer_with_special_token_compat
from transformers.utils import logging as logging_of_transformers

from transcoders.bridging import check_logits
from transcoders.errors import ModelError
from transcoders.hub import first_line, model_source
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype
from transcoders.random_models import random_model

__all__ = ["load_model", "random_model"]


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: Precision = torch.float32
) -> LanguageModel:
    """A model from a local Hugging Face folder, or by its hub name.

    `dtype`: a precision, `"bfloat16"` or `torch.bfloat16`.
    Raises `ModelError` where there is no such folder, the hub cannot give it, the device cannot be used, or the logits
    of a few tokens are not those that transformers itself computes.
    """
    dtype = as_dtype(dtype)
    _check_device(device)
    source = model_source(name)
    try:
        with _no_bars():
            bridge = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
        tokenizer = _own_tokenizer(bridge.tokenizer)
    except Exception as error:  # the hub client, transformers and TransformerLens raise many kinds here
        if architecture := re.search(r"Config architectures: \['(.*?)'\]", first_line(error)):
            raise ModelError(
                f"{name} cannot be used: TransformerLens has no bridge for {architecture[1]}; "
                "the families that work are listed in docs/families.md."
            ) from error
        raise ModelError(
            f"Could not load the model {str(name)!r} ({first_line(error)}); check the name and the network, "
            "or give a local folder in Hugging Face layout."
        ) from error
    model = LanguageModel(
        bridge, Path(source).name if Path(name).expanduser().is_dir() else str(name), tokenizer=tokenizer
    )
    _require_finite(str(name), bridge)
    check_logits(bridge, model.name)
    logging.getLogger(__name__).info("loaded %s: %d layers", name, model.n_layers)
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    """Weights are read from the disk without a progress bar; downloads, the hub client's, keep theirs."""
    earlier = logging_of_transformers.set_tqdm_hook(
        lambda make, args, settings: make(*args, **{**settings, "disable": True})
    )
    try:
        yield
    finally:
        logging_of_transformers.set_tqdm_hook(earlier)


def _own_tokenizer(changed: Any) -> Any:
    """The model's tokenizer as it was saved: the bridge's adds BOS, and has EOS in its place where there is none."""
    return autotokenizer_with_special_token_compat(changed.name_or_path, use_fast=changed.is_fast)


def _require_finite(name: str, bridge: TransformerBridge) -> None:
    for parameter, weight in bridge.named_parameters():
        least, most = (weight.detach().min(), weight.detach().max()) if weight.numel() else (0.0, 0.0)
        if not math.isfinite(float(least) + float(most)):
            raise ModelError(
                f"The model {name!r} has a weight in {parameter.replace('_original_component.', '')} that is not a "
                "finite number; download or train it again, or load it in a wider dtype."
            )


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"The device {str(device)!r} cannot be used here ({first_line(error)}); try 'cpu'.") from error
