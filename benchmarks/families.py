"""Claim: attribution in closed form takes these families of models, each checked on a small random model in float64.

A model is saved in Hugging Face's layout, loaded, and attributed on one prompt with random skip transcoders, per-layer
and cross-layer; errors are shares of the largest edge, or logit. `contract`: it also passes
tests/contracts/test_attribution_contract.py, where every source is doubled in the frozen model. What is refused is
refused when it is loaded, or before its first row is computed.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from machine import write_table

import circuitsae.pocket
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.replacement import ReplacementModel
from transcoders import load_model
from transcoders.bridge import own_logits
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel
from transcoders.random_models import Family, random_module

CONTRACT = (
    "gpt2", "llama", "opt", "gpt_neo", "gptj", "gpt_neox", "bloom", "mistral", "mixtral", "qwen2", "qwen3", "gemma2",
    "gemma3", "phi", "olmo2",
)  # fmt: skip
SIZES = {"n_layers": 3, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_vocab": 64, "context": 64}
TOKENS = torch.tensor([7, 11, 22, 33, 11, 7])
HIDDEN = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 32,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GPT1 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 64}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neox, one after the other": ("GPTNeoXConfig", "GPTNeoXForCausalLM", HIDDEN | {"use_parallel_residual": False}),
    "falcon, new decoder": (
        "FalconConfig", "FalconForCausalLM", HIDDEN | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon, alibi": ("FalconConfig", "FalconForCausalLM", HIDDEN | {"alibi": True, "parallel_attn": False}),
    "openai-gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT1),
    "opt, projected embeddings": (
        "OPTConfig", "OPTForCausalLM",
        HIDDEN | {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "lfm2, convolutions": (
        "Lfm2Config", "Lfm2ForCausalLM",
        HIDDEN | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", HIDDEN | {"state_size": 4}),
    "xglm": (
        "XGLMConfig", "XGLMForCausalLM",
        {"d_model": 16, "num_layers": 3, "attention_heads": 4, "vocab_size": 64, "ffn_dim": 32},
    ),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", HIDDEN),
}  # fmt: skip
"""Variants that are no family of `random_model`, and what is refused."""


def models() -> Iterator[tuple[str, Callable[[], Any]]]:
    for family in (*CONTRACT, *(family for family in get_args(Family) if family not in CONTRACT)):
        yield family, lambda family=family: random_module(family, {**SIZES, "d_mlp": None}, seed=0)
    for name, (config, architecture, arguments) in OTHERS.items():
        yield (
            name,
            lambda c=config, a=architecture, k=arguments: getattr(transformers, a)(getattr(transformers, c)(**k)),
        )


def loaded(module: Any) -> LanguageModel:
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(circuitsae.pocket.__file__).parent / "model" / name, folder)
        model = load_model(folder, dtype=torch.float64)
        model.name = "the model"
        return model


def row(name: str, build: Callable[[], Any]) -> list[str]:
    try:
        model = loaded(build())
    except ModelError as error:
        return [name, "no", "", "", "", "", _sentence(error)]
    logits, own = model.run(TOKENS[None])[0], own_logits(model.bridge, TOKENS[None])
    logit_difference = f"{float((logits - own).abs().max() / own.abs().max()):.0e}"
    try:
        closed, exact, engines = errors(model)
    except ModelError as error:
        return [name, "yes", "no", "", "", logit_difference, _sentence(error)]
    how = "no; autograd" if closed is None else "yes"
    tested = "contract" if name in CONTRACT else "in short"
    return [
        name,
        "yes",
        how,
        f"{exact if closed is None else closed:.0e}",
        engines,
        logit_difference,
        tested,
    ]


def errors(model: LanguageModel) -> tuple[float | None, float, str]:
    """Largest conservation error of each engine, and how far they are apart, as shares of the largest edge."""
    closed, exact, apart = [], [], []
    for kind in ("plt", "clt"):
        dictionaries = random_dictionaries(kind, n_layers=3, d_model=16, features=16, skip=True, dtype=torch.float64)
        replacement = ReplacementModel(model, dictionaries)
        slow = attribute(replacement, TOKENS, targets=LogitTargets([3, 5]), engine="autograd")
        size = abs(slow.weights).max()
        exact.append(abs(slow.residual()).max() / size)
        try:
            graph = attribute(replacement, TOKENS, targets=LogitTargets([3, 5]), engine="closed_form")
        except ModelError:
            continue
        closed.append(abs(graph.residual()).max() / size)
        apart.append(abs(graph.weights - slow.weights).max() / size)
    return (max(closed) if closed else None), max(exact), f"{max(apart):.0e}" if apart else ""


def _sentence(error: ModelError) -> str:
    folder = re.compile(rf"'?({re.escape(tempfile.gettempdir())}/)?tmp\w{{8}}'?")
    return (
        folder.sub("the model", str(error))
        .replace("\n", " ")
        .replace("|", "/")
        .replace(" the model the model", " the model")
    )


@torch.no_grad()
def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name, build in models():
        torch.manual_seed(0)
        rows.append(row(name, build))
        print(rows[-1], file=sys.stderr)
    columns = [
        "family", "loads", "closed form", "largest conservation error", "fast against plain",
        "logits against transformers' own", "tested, or why not",
    ]  # fmt: skip
    text = write_table("families", str(__doc__).strip(), columns, rows)
    print(text)


if __name__ == "__main__":
    main()
