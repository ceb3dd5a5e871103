"""Language models from a folder, from the hub, or around a model of transformers that is in memory."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transcoders import hf_models
from transcoders.bridge import (
    TransformerBridge,
    around_any,
    boot,
    check_logits,
    has_bridge,
    no_bars,
    saved_tokenizer,
    unsupported_architecture,
)
from transcoders.devices import AUTO, Work, accelerators, choose_device
from transcoders.errors import InputError, ModelError
from transcoders.files import lasting
from transcoders.hf_models import DeviceMap, Loading
from transcoders.hub import downloaded, first_line, model_source
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype, check_device
from transcoders.random_models import random_model

__all__ = ["load_model", "random_model"]

logger = logging.getLogger(__name__)

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = ("model_type", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers")
"""What tells one model from another in config.json, as families call it."""

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece*", "*.tiktoken", "sentencepiece*")
_PLACES = "check the name and the network, or give a local folder in Hugging Face layout"


def load_model(
    name: str | Path | None = None,
    *,
    hf_model: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = "auto",
    dtype: Precision | None = None,
    torch_dtype: Precision | None = None,
    device_map: DeviceMap | None = None,
    quantization_config: Any = None,
    adapter: str | Path | None = None,
) -> LanguageModel:
    """A model from a local Hugging Face folder, by its hub name, or around one of transformers that is in memory.

    `hf_model`: such a model, or peft's around one. It stays as it is (mode, gradients, attention, precision); its
    weights are shared, not copied, so that training it goes on showing; adapters are merged, and quantised weights
    written out, in tensors of our own. `name` is then what it is called, and without a `tokenizer` prompts are tokens.
    `tokenizer`: one of transformers, or where one is; by default the model's own.
    `revision`: branch, tag or commit. `trust_remote_code`: run Python code of the repository.
    `device`: by default `"auto"`, the accelerator there is, or the CPU where that is faster for so small a model
    (`transcoders.devices`); for `hf_model` where it is. `device_map`: several, as in transformers.
    `dtype`: a precision, `"bfloat16"` or `torch.bfloat16`; float32 by default, for `hf_model` its own. `torch_dtype` is
    another name for it.
    `quantization_config`: of transformers; weights quantised so, or in the checkpoint, are computed with as the numbers
    they stand for, in `dtype`.
    `adapter`: a folder or hub name of peft, merged into the weights.
    Raises `ModelError` where there is no such folder, the hub cannot give it, the device cannot be used, the logits of
    a few tokens are not those that transformers itself computes, or arguments contradict each other.
    """
    how = Loading(
        revision=revision, trust_remote_code=trust_remote_code, device_map=device_map,
        quantization_config=quantization_config,
    )  # fmt: skip
    precision = _one_dtype(dtype, torch_dtype)
    device = None if device == AUTO else device
    if device is not None:
        check_device(device, ModelError)
    given = None if tokenizer is None else _tokenizer(tokenizer, trust_remote_code)
    if hf_model is not None:
        found = _in_memory(hf_model, name, device, precision, how, adapter, given)
    elif name is None:
        raise ModelError("No model was named; give a hub name or a folder, or hf_model=…, one that is in memory.")
    else:
        found = _by_name(name, device, precision or torch.float32, how, adapter, given)
    model = LanguageModel(found.bridged, found.name, tokenizer=found.tokenizer, origin=found.origin)
    if hf_model is None and name is not None:
        model.place = lasting(name)
    _require_finite(model)
    check_logits(found.bridged, model.name)
    if given is not None:
        _require_small_vocabulary(model)
    logger.info("loaded %s: %d layers", model.name, model.n_layers)
    return model


def device_for(
    name: str | Path,
    device: str | torch.device | None = AUTO,
    *,
    revision: str | None = None,
    dtype: Precision = "float32",
    work: Work = "attribution",
) -> torch.device:
    """The device that `load_model` puts a model on, which need not be loaded for that; `work`: what it is chosen for.

    Raises `ModelError` where there is no such model, or the device cannot be used.
    """
    if device is not None and device != AUTO:
        check_device(device, ModelError)
        return torch.device(device)
    if not accelerators():
        return torch.device("cpu")
    with _one_sentence(str(name)):
        settings = hf_models.settings_of(model_source(name, revision), revision)
    return choose_device(parameters=_parameters(settings), work=work, dtype=as_dtype(dtype))


class _Found(NamedTuple):
    """What a `LanguageModel` is made of."""

    bridged: TransformerBridge
    name: str
    tokenizer: Any
    origin: Mapping[str, str]


# by name


def _by_name(
    name: str | Path, device: str | torch.device | None, dtype: torch.dtype, how: Loading, adapter: str | Path | None,
    tokenizer: Any,
) -> _Found:  # fmt: skip
    if how.device_map is not None and device is not None:
        raise ModelError(f"Give device={str(device)!r} or device_map={how.device_map!r}, not both.")
    source = model_source(name, how.revision)
    origin = _origin(how, adapter)
    if source != str(name):
        how = replace(how, revision=None)  # the folder is of the revision that was asked for
    with _one_sentence(str(name)):
        settings = hf_models.settings_of(source, how.revision)
        device = choose_device(device, parameters=_parameters(settings), dtype=dtype)
        _require_trust(str(name), settings, how.trust_remote_code)
        stored = settings.get("quantization_config") or None
        origin |= _quantisation(stored or how.quantization_config)
        saved = tokenizer is None and _holds_tokenizer(source)
        if saved and "quantisation" not in origin and adapter is None and _is_bridged(settings):
            bridge, tokenizer = boot(source, device, dtype, how)
        else:
            with no_bars():
                module = hf_models.load_module(source, device, dtype, how, stored)
            bridge = around_any(hf_models.with_plain_weights(module, dtype, adapter), str(name))
            if saved:
                tokenizer = saved_tokenizer(source, revision=how.revision, trust_remote_code=how.trust_remote_code)
    return _Found(bridge, _called(name), tokenizer, origin)


def _parameters(settings: Mapping[str, Any]) -> float | None:
    """Of a model with such a config.json, roughly: blocks of 12 d² and an embedding; None where it names no sizes."""
    sizes = settings.get("text_config") or settings

    def first(*names: str) -> int | None:
        return next((sizes[name] for name in names if isinstance(sizes.get(name), int)), None)

    d, layers = first("hidden_size", "n_embd", "d_model"), first(*_LAYERS)
    return None if d is None or layers is None else 12.0 * layers * d * d + d * (first("vocab_size") or 0)


def _is_bridged(settings: Mapping[str, Any]) -> bool:
    """Whether TransformerLens may know the class; of one of the repository's own, it may still know the parent."""
    return hf_models.own_code(settings) is None or any(map(has_bridge, settings.get("architectures") or ()))


def _holds_tokenizer(source: str) -> bool:
    """Whether a folder has files of a tokenizer; of the hub's repositories, it is assumed."""
    folder = Path(source)
    return not folder.is_dir() or any(next(folder.glob(files), None) for files in _TOKENIZER_FILES)


def _require_trust(name: str, settings: Mapping[str, Any], trusted: bool) -> None:
    if (code := hf_models.own_code(settings)) is not None and not trusted:
        raise ModelError(
            f"{name} runs Python code of its own repository ({code}); read it, and where you trust it, give "
            "trust_remote_code=True (--trust-remote-code)."
        )


@contextmanager
def _one_sentence(name: str, instead: str = _PLACES) -> Iterator[None]:
    """Whatever the hub client, transformers, peft and TransformerLens raise, as a `ModelError`."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        said = " ".join(str(error).split())
        raise ModelError(f"{name} needs a package that is not installed ({said}); install it with pip.") from error
    except Exception as error:
        if architecture := unsupported_architecture(first_line(error)):
            raise ModelError(
                f"{name} cannot be used: TransformerLens has no bridge for {architecture}; "
                "the families that work are listed in docs/families.md."
            ) from error
        raise ModelError(f"Could not load the model {name!r} ({first_line(error)}); {instead}.") from error


# in memory


def _in_memory(
    hf_model: Any, name: str | Path | None, device: str | torch.device | None, dtype: torch.dtype | None, how: Loading,
    adapter: str | Path | None, tokenizer: Any,
) -> _Found:  # fmt: skip
    for argument, value in vars(how).items():
        if value not in (None, False):
            raise ModelError(
                f"hf_model is in memory already, but {argument}={value!r} says how to load one; leave it out."
            )
    module = hf_models.copy_around(hf_model)
    called = _called(name or getattr(module.config, "_name_or_path", "") or type(module).__name__)
    origin, own = _origin(how, adapter) | _quantisation(hf_models.quantised_by(module)), module.dtype
    if dtype is not None and dtype != own and "quantisation" not in origin:
        raise ModelError(
            f"hf_model holds {_bare(own)} weights, but dtype is {_bare(dtype)}; leave dtype out, or convert it first: "
            f"hf_model.to(torch.{_bare(dtype)})."
        )
    _require_same_sizes(called, name, module.config)
    with _one_sentence(called, "save it with save_pretrained() and give the folder"):
        module = hf_models.with_plain_weights(module, dtype or own, adapter)
        if device is not None:
            _require_one_device(module, device)
            module = module.to(device)
        bridge = around_any(module, called)
    return _Found(bridge, called, tokenizer, origin)


def _require_same_sizes(called: str, name: str | Path | None, config: Any) -> None:
    """Refuse the name of a model that is here and of other sizes."""
    if name is None:
        return
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else downloaded(str(name))
    if folder is None or not (folder / "config.json").is_file():
        return
    named, given = hf_models.settings_of(str(folder), None), config.to_dict()
    for size in _SIZES:
        if size in named and size in given and named[size] != given[size]:
            raise ModelError(
                f"The model {called!r} has {size} {named[size]}, but hf_model has {given[size]}; "
                "leave the name out, or give the model that it names."
            )


def _require_one_device(module: Any, device: str | torch.device) -> None:
    if len(set((getattr(module, "hf_device_map", None) or {}).values())) > 1:
        raise ModelError(f"hf_model is spread over devices, so it cannot be put on {str(device)!r}; leave device out.")


# both


def _called(name: str | Path) -> str:
    """A hub name as it is, a folder by its own name."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else str(name)


def _one_dtype(dtype: Precision | None, torch_dtype: Precision | None) -> torch.dtype | None:
    given = {as_dtype(precision) for precision in (dtype, torch_dtype) if precision is not None}
    if len(given) > 1:
        raise ModelError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} are two precisions; give one of them.")
    return given.pop() if given else None


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _origin(how: Loading, adapter: str | Path | None) -> dict[str, str]:
    stated = {"revision": how.revision, "adapter": None if adapter is None else str(adapter)}
    return {key: value for key, value in stated.items() if value is not None}


def _quantisation(config: Any) -> dict[str, str]:
    method = hf_models.quantisation(config)
    return {} if method is None else {"quantisation": method}


def _tokenizer(given: Any, trust_remote_code: bool) -> Any:
    """A tokenizer of transformers that was given, or that of the place that was."""
    if isinstance(given, str | Path):
        folder = Path(given).expanduser()
        place = str(folder) if folder.is_dir() else model_source(given)
        try:
            return saved_tokenizer(place, trust_remote_code=trust_remote_code)
        except Exception as error:  # of the hub client, transformers and tokenizers
            raise ModelError(f"There is no tokenizer at {place} ({first_line(error)}); give another place.") from error
    if not hasattr(given, "convert_ids_to_tokens"):
        raise ModelError(f"tokenizer is a {type(given).__name__}; expected one of transformers, or where one is.")
    return given


def _require_small_vocabulary(model: LanguageModel) -> None:
    if model.tokenizer.vocab_size > model.d_vocab:
        raise ModelError(
            f"The tokenizer has {model.tokenizer.vocab_size} tokens, but {model.name} only {model.d_vocab}; give the "
            "tokenizer that the model was trained with."
        )


def _require_finite(model: LanguageModel) -> None:
    for parameter, weight in model.parts.parameters():
        least, most = (weight.detach().min(), weight.detach().max()) if weight.numel() else (0.0, 0.0)
        if not math.isfinite(float(least) + float(most)):
            raise ModelError(
                f"The model {model.name!r} has a weight in {parameter} that is not a "
                "finite number; download or train it again, or load it in a wider dtype."
            )
