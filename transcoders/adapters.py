"""Adapters of peft: taken off a model that carries some, read from a folder or the hub, merged into plain weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from transcoders.errors import ModelError
from transcoders.hub import first_line, folder_or_name, hub_says

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What peft puts before the names of a model's own parameters."""


class Adapter(NamedTuple):
    """One adapter, apart from any model."""

    what: str
    """What it is called, for messages."""
    config: Any
    weights: dict[str, Tensor]


def has_adapters(module: Any) -> bool:
    """Whether a model of transformers or peft carries adapters."""
    return bool(getattr(module, "peft_config", None))


def read_adapter(place: str | Path) -> Adapter:
    """An adapter from a folder, or by its hub name. Raises `ModelError` where there is none."""
    _require_peft(f"The adapter {str(place)!r}")
    from peft import PeftConfig  # pyright: ignore[reportMissingImports]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _folder(place)
    try:
        return Adapter(
            f"The adapter {str(place)!r}", PeftConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS)
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"The adapter {str(place)!r} cannot be read ({first_line(error)}); save it again with save_pretrained()."
        ) from error


def _folder(place: str | Path) -> Path:
    folder = Path(place).expanduser()
    if not folder.exists() and isinstance(place, str) and place.count("/") == 1 and place[0] not in "./~":
        folder = _downloaded(place)
    if not (folder / _CONFIG).is_file():
        raise ModelError(
            f"There is no adapter at {folder}: no {_CONFIG}; give the folder that peft's save_pretrained wrote."
        )
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(f"The adapter at {folder} has no {_WEIGHTS} (pickles are not read); save it as safetensors.")
    return folder


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    instead = "check the name and the network, or give a folder"
    found = folder_or_name(name, f"The adapter {name!r}", ModelError, instead)
    if isinstance(found, Path):
        return found
    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
    except Exception as error:  # the hub client raises many kinds, of its own and of its HTTP library
        raise ModelError(f"Could not download the adapter {name!r} ({hub_says(error)}); {instead}.") from error


def take_off(module: Any) -> tuple[Any, list[Adapter]]:
    """The model without its adapters, and those that were active; those merged into its weights already stay there.

    `module` is used up. It is one of peft's, or one of transformers' after `load_adapter`.
    """
    from peft import PeftModel, get_peft_model_state_dict  # pyright: ignore[reportMissingImports]

    wrapped = isinstance(module, PeftModel)
    active = list(module.active_adapters if wrapped else module.active_adapters())
    merged = {name for part in module.modules() for name in getattr(part, "merged_adapters", ())}
    adapters = []
    for name in active:
        if name in merged:
            continue
        config = module.peft_config[name]
        _refuse_prompts(f"The adapter {name!r} of hf_model", config)
        state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
        weights = {key if key.startswith(_PREFIX) else _PREFIX + key: weight for key, weight in state.items()}
        adapters.append(Adapter(f"The adapter {name!r} of hf_model", config, weights))
    return (module.unload() if wrapped else _bare(module)), adapters


def _bare(module: Any) -> Any:
    """A model of transformers with the modules that its adapters were put around."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # pyright: ignore[reportMissingImports]
    from peft.utils.other import AuxiliaryTrainingWrapper  # pyright: ignore[reportMissingImports]

    around = [
        (parent, name, part)
        for parent in module.modules()
        for name, part in parent.named_children()
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not isinstance(parent, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for parent, name, part in around:
        setattr(parent, name, part.get_base_layer() if isinstance(part, BaseTunerLayer) else part.original_module)
    module._hf_peft_config_loaded = False
    del module.peft_config
    return module


def merge(module: Any, adapter: Adapter) -> Any:
    """The model with an adapter's change added to its weights, `W + ΔW`; tensors shared with others stay as they are.

    Raises `ModelError` for adapters that change no weights, and for those made for other sizes or names.
    """
    from peft import PeftModel, set_peft_model_state_dict  # pyright: ignore[reportMissingImports]

    _refuse_prompts(adapter.what, adapter.config)
    base = getattr(adapter.config, "base_model_name_or_path", None) or "another model"
    try:
        carrier = PeftModel(module, adapter.config)
        found = set_peft_model_state_dict(carrier, dict(adapter.weights))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{adapter.what} does not fit this model ({first_line(error)}); it was made for {base}."
        ) from error
    own = [key for key in found.missing_keys if ".default" in key or "modules_to_save" in key]
    if wrong := [*found.unexpected_keys, *own]:
        raise ModelError(
            f"{adapter.what} does not fit this model: {wrong[0]} is on one side only, and {len(wrong) - 1} others; "
            f"it was made for {base}."
        )
    try:
        return carrier.merge_and_unload(safe_merge=True)  # not in place: others may hold the same tensors
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{adapter.what} cannot be merged ({first_line(error)}); merge it with peft's merge_and_unload() and give "
            "the model that results."
        ) from error


def _refuse_prompts(what: str, config: Any) -> None:
    if config.is_prompt_learning:
        raise ModelError(
            f"{what} is of the kind {config.peft_type}, which adds vectors to the prompt and changes no weights; "
            "only adapters that can be merged into weights, such as LoRA, are used."
        )


def _require_peft(what: str) -> None:
    if find_spec("peft") is None:
        raise ModelError(f"{what} is merged by the package peft, which is not installed; pip install peft.")
