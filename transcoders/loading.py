"""Language models from a folder or from the hub."""

import logging
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge

from transcoders.errors import ModelError
from transcoders.hub import first_line, model_source
from transcoders.language_model import LanguageModel
from transcoders.random_models import random_model

__all__ = ["load_model", "random_model"]


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model from a local Hugging Face folder, or by its hub name.

    Raises `ModelError` where there is no such folder, the hub cannot give it, or the device cannot be used.
    """
    _check_device(device)
    source = model_source(name)
    try:
        bridge = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
    except Exception as error:  # the hub client, transformers and TransformerLens raise many kinds here
        raise ModelError(
            f"Could not load the model {str(name)!r} ({first_line(error)}); check the name and the network, "
            "or give a local folder in Hugging Face layout."
        ) from error
    logging.getLogger(__name__).info("loaded %s: %d layers", name, bridge.cfg.n_layers)
    return LanguageModel(bridge, Path(source).name if Path(name).expanduser().is_dir() else str(name))


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"The device {str(device)!r} cannot be used here ({first_line(error)}); try 'cpu'.") from error
