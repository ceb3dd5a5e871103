"""Language models from a folder or from the hub."""

import logging
import math
from pathlib import Path

import torch

from transcoders.bridge import boot, check_logits, unsupported_architecture
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
        bridge, tokenizer = boot(source, device, dtype)
    except Exception as error:  # the hub client, transformers and TransformerLens raise many kinds here
        if architecture := unsupported_architecture(first_line(error)):
            raise ModelError(
                f"{name} cannot be used: TransformerLens has no bridge for {architecture}; "
                "the families that work are listed in docs/families.md."
            ) from error
        raise ModelError(
            f"Could not load the model {str(name)!r} ({first_line(error)}); check the name and the network, "
            "or give a local folder in Hugging Face layout."
        ) from error
    model = LanguageModel(
        bridge, Path(source).name if Path(name).expanduser().is_dir() else str(name), tokenizer=tokenizer
    )
    _require_finite(str(name), model)
    check_logits(bridge, model.name)
    logging.getLogger(__name__).info("loaded %s: %d layers", name, model.n_layers)
    return model


def _require_finite(name: str, model: LanguageModel) -> None:
    for parameter, weight in model.parts.parameters():
        least, most = (weight.detach().min(), weight.detach().max()) if weight.numel() else (0.0, 0.0)
        if not math.isfinite(float(least) + float(most)):
            raise ModelError(
                f"The model {name!r} has a weight in {parameter} that is not a "
                "finite number; download or train it again, or load it in a wider dtype."
            )


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"The device {str(device)!r} cannot be used here ({first_line(error)}); try 'cpu'.") from error
