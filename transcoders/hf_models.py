"""Models of transformers as people have them, with plain weights: a checkpoint, or one in memory that stays as it is.

Attribution reads weights as matrices. So adapters are merged into them, and quantised ones are written out in full.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transcoders.adapters import has_adapters, merge, read_adapter, take_off
from transcoders.devices import choose_device
from transcoders.errors import ModelError
from transcoders.hub import first_line
from transcoders.precision import check_device

DeviceMap = str | Mapping[str, str | int | torch.device]
"""What goes on which device: accelerate's `"auto"`, or names of modules with their devices."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a checkpoint is loaded."""

    revision: str | None = None
    """A branch, tag or commit of the hub's repository."""
    trust_remote_code: bool = False
    """Whether Python code of the repository may be run."""
    device_map: DeviceMap | None = None
    quantization_config: Any = None
    """Of transformers, such as `BitsAndBytesConfig(load_in_4bit=True)`."""


def settings_of(source: str, revision: str | None) -> dict[str, Any]:
    """What config.json says, with no code of the repository run."""
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(source, revision=revision)[0]


def own_code(settings: Mapping[str, Any]) -> str | None:
    """The module of its repository that a model's class is in, where transformers has none of that name."""
    import transformers

    places = settings.get("auto_map") or {}
    known = settings.get("model_type") in transformers.CONFIG_MAPPING
    if known and all(hasattr(transformers, name) for name in settings.get("architectures") or ()):
        return None
    place = places.get("AutoModelForCausalLM") or places.get("AutoConfig")
    return None if place is None else str(place)


def load_module(
    source: str, device: str | torch.device, dtype: torch.dtype, how: Loading, stored: Mapping[str, Any] | None
) -> Any:
    """A checkpoint as a model of transformers; `stored`: what it says of how its weights are quantised."""
    from transformers import AutoModelForCausalLM

    quantised = how.quantization_config is not None or stored is not None
    placed: dict[str, Any] = {} if how.device_map is None else {"device_map": how.device_map}
    if quantised and not placed:
        placed = {"device_map": {"": str(device)}}  # some are quantised, or unpacked, on the device they are loaded to
    if (config := how.quantization_config or _written_out(stored)) is not None:
        placed["quantization_config"] = config
    module: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32 if quantised else dtype,  # bitsandbytes takes no float64
        revision=how.revision or "main", trust_remote_code=how.trust_remote_code,
        attn_implementation="eager", **placed,
    )  # fmt: skip
    if quantised_by(module) is None:
        _cast(module, dtype)
    return module if placed else module.to(device)


def copy_around(model: Any) -> Any:
    """A model with modules and settings of its own around the same weights: no memory, and nothing done to it is seen.

    Weights that are changed in place, as optimisers do, change in both; quantised ones are copied, and hooks are left
    behind. Raises `ModelError` for what is no causal language model of transformers, or of peft around one.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    _require_language_model(model)
    shared: dict[int, Any] = {}
    for tensor in model.parameters():
        if type(tensor) is nn.Parameter:
            shared[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
    for tensor in model.buffers():
        shared[id(tensor)] = tensor.detach().clone()  # small, and bridges write into some
    try:
        return _without_hooks(copy.deepcopy(model, shared))
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"hf_model cannot be copied ({first_line(error)}); save it with save_pretrained() and give the folder."
        ) from error


def _without_hooks(model: Any) -> Any:
    for part in model.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
        part.__dict__.pop("_output_capturing_hooks_installed", None)  # transformers' own come back when they are needed
    return model


def _require_language_model(model: Any) -> None:
    from transformers import PreTrainedModel

    inner = model.get_base_model() if has_adapters(model) and hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ModelError(
            f"hf_model is a {type(model).__name__}; expected a causal language model of transformers, such as "
            "AutoModelForCausalLM.from_pretrained(…) gives, or peft's around one."
        )
    if empty := [name for name, weight in inner.named_parameters() if weight.is_meta]:
        raise ModelError(f"hf_model holds no weights for {empty[0]} (device 'meta'); load it onto a device.")


def _written_out(stored: Mapping[str, Any] | None) -> Any:
    """Of the kinds that can only be written out while they are loaded, the configuration that says so."""
    import transformers

    kinds = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
    kind = None if stored is None else kinds.get(str(stored.get("quant_method")))
    return None if kind is None else getattr(transformers, kind)(dequantize=True)


def quantisation(config: Any) -> str | None:
    """How weights are quantised by a configuration, such as `"bitsandbytes 4-bit"`; None where there is none."""
    if config is None:
        return None
    stated = config if isinstance(config, Mapping) else vars(config)
    method = getattr(stated.get("quant_method"), "value", stated.get("quant_method"))
    bits = next((n for n in (4, 8) if stated.get(f"_load_in_{n}bit") or stated.get(f"load_in_{n}bit")), None)
    return str(method) if bits is None else f"{method} {bits}-bit"


def quantised_by(module: Any) -> Any:
    """The configuration by which the weights of a model of transformers are quantised; None for plain ones."""
    return module.config.quantization_config if getattr(module, "is_quantized", False) else None


def with_plain_weights(module: Any, dtype: torch.dtype, adapter: str | Path | None) -> Any:
    """The model with its adapters merged, and `adapter`, and with quantised weights written out in `dtype`.

    Quantised weights are written out first, for merged into them a small change would be rounded away. `module` is
    used up.
    """
    _refuse_repacked(module)
    module, adapters = take_off(module) if has_adapters(module) else (module, [])
    if adapter is not None:
        adapters = [*adapters, read_adapter(adapter)]
    if (config := quantised_by(module)) is not None:
        module = _dequantised(module, str(quantisation(config)), dtype)
    for each in adapters:
        module = merge(module, each)
    for name, weight in _not_plain(module):
        raise ModelError(
            f"The weight {name} is stored as {str(weight.dtype).removeprefix('torch.')} values, which cannot be read "
            "as a matrix; give the model without quantisation."
        )
    return module


def _refuse_repacked(module: Any) -> None:
    """On a CPU bitsandbytes rounds and reorders 4-bit weights when they are first used, and cannot go back."""
    for name, weight in module.named_parameters():
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) or getattr(state, "original_qshape", None) is not None:
            raise ModelError(
                f"hf_model has been run on the CPU, where bitsandbytes then stores {name} in another order that is "
                "not read; load it again, and give it before its first run."
            )


def _dequantised(module: Any, method: str, dtype: torch.dtype) -> Any:
    try:
        module = module.dequantize(dtype=dtype)
    except NotImplementedError as error:
        raise ModelError(
            f"The weights are quantised by {method}, which transformers cannot undo; give the model without "
            "quantisation, or quantised by bitsandbytes."
        ) from error
    _cast(module, dtype)
    return module


def _cast(module: Any, dtype: torch.dtype) -> None:
    """Weights alone: buffers, such as rotary frequencies, keep their precision."""
    for weight in module.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def _not_plain(module: Any) -> Iterator[tuple[str, Tensor]]:
    for name, weight in module.named_parameters():
        if not weight.is_floating_point() or weight.element_size() < 2:
            yield name, weight


# models that answer


class Chat:
    """A causal model of transformers as it is, that answers messages: greedily, so always the same.

    Messages are put together by the tokenizer's chat template; without one, one under the other. Raises `ModelError`
    for a model that cannot be loaded, and for messages that do not fit its context; code of its repository is not run.
    """

    def __init__(self, source: str, *, device: str | torch.device = "auto", dtype: str = "auto") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        chosen = choose_device(device)
        check_device(chosen, ModelError)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(
                f"{source} is no causal model of transformers with a tokenizer ({first_line(error)}); give a hub name "
                "or a folder in Hugging Face layout."
            ) from error
        self._source, self._model = source, model.to(chosen).eval()

    @torch.no_grad()
    def answer(self, messages: Sequence[Mapping[str, str]], most: int) -> tuple[str, int, int]:
        """The answer of at most `most` tokens; how many tokens the messages were, and how many it has."""
        ids = self._ids(messages)
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is not None and ids.shape[1] + most > context:
            raise ModelError(
                f"A question of {ids.shape[1]:,} tokens and an answer of {most} do not fit the {context:,} tokens of "
                f"{self._source}; give fewer or shorter texts."
            )
        ends = self._tokenizer.eos_token_id
        found = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, pad_token_id=ends or 0
        )[0, ids.shape[1] :]
        return self._tokenizer.decode(found, skip_special_tokens=True), ids.shape[1], len(found)

    def _ids(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            found = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            found = self._tokenizer("\n\n".join(each["content"] for each in messages) + "\n", return_tensors="pt")
        return found["input_ids"].to(self._model.device)
