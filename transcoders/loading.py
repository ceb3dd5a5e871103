"""Language models from a folder, from the hub, or random."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel

Family = Literal["gpt2", "llama"]


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model from a local Hugging Face folder, or by its hub name.

    Raises `ModelError` where there is no such folder, the hub cannot give it, or the device cannot be used.
    """
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


def random_model(
    family: Family = "gpt2",
    *,
    n_layers: int = 2,
    d_model: int = 32,
    n_heads: int = 4,
    d_mlp: int | None = None,
    d_vocab: int = 64,
    context: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A seeded random model of a family's exact architecture, built in memory; no download, no tokenizer.

    `gpt2`: LayerNorm, learned positions, biases. `llama`: RMSNorm, rotary positions, grouped-query attention
    (half as many key-value heads), gated MLP. Biases and norm weights are random too, so that none can hide.
    """
    import transformers

    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=n_layers, n_embd=d_model, n_head=n_heads, n_inner=d_mlp, vocab_size=d_vocab,
            n_positions=context, bos_token_id=0, eos_token_id=0
        )  # fmt: skip
        architecture = "GPT2LMHeadModel"
    elif family == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=n_layers, hidden_size=d_model, num_attention_heads=n_heads,
            num_key_value_heads=max(1, n_heads // 2), intermediate_size=d_mlp or 2 * d_model, vocab_size=d_vocab,
            max_position_embeddings=context, bos_token_id=0, eos_token_id=0
        )  # fmt: skip
        architecture = "LlamaForCausalLM"
    else:
        raise ModelError(f"Unknown family {family!r}; random models come as 'gpt2' or 'llama'.")
    config.architectures = [architecture]
    model = getattr(transformers, architecture)(config).to(dtype).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    name = f"random-{family}-{seed}"
    return LanguageModel(build_bridge_from_module(model, architecture, hf_config=config, model_name=name), name)


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of scale 1/√fan-in, norms around one, biases of scale 0.1."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias"):
            value = 0.1 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.1 * noise
        else:
            value = noise / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)
