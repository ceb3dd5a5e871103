"""Language models from a folder or from the hub."""

import logging
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge

from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype
from transcoders.random_models import random_model

__all__ = ["load_model", "random_model"]


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: Precision = torch.float32
) -> LanguageModel:
    """A model from a local Hugging Face folder, or by its hub name.

    `dtype`: a precision, `"bfloat16"` or `torch.bfloat16`.
    Raises `ModelError` where there is no such folder, the hub cannot give it, or the device cannot be used.
    """
    dtype = as_dtype(dtype)
    _check_device(device)
    folder = Path(name).expanduser()
    source = _model_folder(folder) if _looks_local(str(name), folder) else str(name)
    try:
        bridge = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
    except Exception as error:  # the hub client, transformers and TransformerLens raise many kinds here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"Could not load the model {str(name)!r} ({reason}); check the name and the network, "
            "or give a local folder in Hugging Face layout."
        ) from error
    logging.getLogger(__name__).info("loaded %s: %d layers", name, bridge.cfg.n_layers)
    return LanguageModel(bridge, Path(source).name if folder.is_dir() else source)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"The device {str(device)!r} cannot be used here ({reason}); try 'cpu'.") from error


def _looks_local(name: str, folder: Path) -> bool:
    return folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _model_folder(folder: Path) -> str:
    if not folder.is_dir():
        raise ModelError(f"There is no model folder at {folder}; give a folder that holds config.json, or a hub name.")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json; expected a folder in Hugging Face layout "
            "(config.json, model.safetensors, tokenizer.json)."
        )
    return str(folder.resolve())
