"""Models and dictionaries by name: those of `transcoders`, and the embedded pocket ones."""

from pathlib import Path
from typing import Any, Unpack

import torch

import transcoders
from circuitsae.pocket import MODEL_DIR, POCKET_DICTIONARIES, dictionary_folder
from transcoders.dictionaries import DictionarySet
from transcoders.errors import DictionaryError, InputError
from transcoders.formats.offers import Offer
from transcoders.formats.registry import Wanted
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype

POCKET = "pocket"


def load_model(
    name: str | Path | None = None,
    *,
    hf_model: Any = None,
    device: str | torch.device | None = "auto",
    dtype: Precision | None = None,
    **how: Any,
) -> LanguageModel:
    """A model by hub name, from a local Hugging Face folder, around `hf_model` of transformers, or the embedded one.

    The embedded one is `"pocket"`, and what there is without a name. `device`: by default an accelerator, or the CPU
    where that is faster for so small a model. `how`: the other arguments of
    `transcoders.load_model`, `tokenizer`, `revision`, `trust_remote_code`, `device_map`, `quantization_config`,
    `adapter`. Raises `ModelError` where there is no such model, or it cannot be used.
    """
    if hf_model is not None or name not in (None, POCKET):
        return transcoders.load_model(name, hf_model=hf_model, device=device, dtype=dtype, **how)
    model = transcoders.load_model(MODEL_DIR, device=device, dtype=dtype, **how)
    model.name = model.place = POCKET
    return model


def load_dictionaries(name: str | Path = POCKET, **wanted: Unpack[Wanted]) -> DictionarySet:
    """Dictionaries of any community by name; the pocket model has `"pocket"` (CLT), `"pocket-plt"`, `"pocket-sae"`.

    `wanted`: the arguments of `transcoders.load_dictionaries`, `sae_id`, `layers`, `site`, `width`, `l0`, `variant`,
    `revision`, `dtype`, `device`, `decoders`. A checkpoint of training, `RUN/checkpoint-…`, is read as well;
    of several dictionaries trained at once, `sae_id` is then the name of one.
    Raises `FileFormatError` for files that are no dictionaries, and `InputError` where a choice is missing.
    """
    if (Path(name) / "state.safetensors").is_file():
        return _of_checkpoint(Path(name), wanted)
    return transcoders.load_dictionaries(_place(name), **wanted)


def _of_checkpoint(folder: Path, wanted: Wanted) -> DictionarySet:
    choices = {
        key: value for key, value in wanted.items() if key not in ("device", "dtype", "sae_id") and value is not None
    }
    choices = {key: value for key, value in choices.items() if (key, value) != ("decoders", "memory")}
    if choices:
        raise InputError(
            f"{folder} is a checkpoint, of which there is nothing to choose; leave out {next(iter(choices))}."
        )
    dictionaries = transcoders.from_checkpoint(folder, name=wanted.get("sae_id"), device=wanted.get("device", "auto"))
    dtype = wanted.get("dtype")
    return dictionaries if dtype is None else dictionaries.to(as_dtype(dtype))


def list_dictionaries(name: str | Path = POCKET, *, revision: str | None = None) -> tuple[str, list[Offer]]:
    """The format of what a name stands for, and the dictionaries it offers; no weights are read or downloaded.

    Raises `FileFormatError` where there are none.
    """
    return transcoders.list_dictionaries(_place(name), revision=revision)


def _place(name: str | Path) -> str | Path:
    return dictionary_folder(name) if str(name) in POCKET_DICTIONARIES else name


def dictionaries_for(model: str, dictionaries: str | None) -> str:
    """The dictionaries to use with a model: those named, or the pocket CLT for the pocket model.

    Raises `DictionaryError` for another model without a name.
    """
    if dictionaries is not None:
        return dictionaries
    if model == POCKET:
        return POCKET
    raise DictionaryError(
        f"No dictionaries were named for {model}; give --dictionaries FOLDER, or train some: "
        f"circuitsae train {model} --corpus TEXT --kind clt --out FOLDER."
    )
