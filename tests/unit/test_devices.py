"""A model spread over devices: torch's fake tensors refuse to mix `cpu` with `cpu:1`, and need neither."""

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from torch._subclasses.fake_tensor import FakeTensorMode

from transcoders.bridge import around_any
from transcoders.language_model import LanguageModel
from transcoders.random_models import random_module
from transcoders.sites import Site

HERE, THERE = "cpu", "cpu:1"
SIZES: dict[str, int | None] = {
    "n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_mlp": 24, "d_vocab": 24, "context": 32,
}  # fmt: skip


def put(module: Any, device: str) -> None:
    """Fake weights on a device, and accelerate's hooks, which bring there what a module reads."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    moved = torch.empty(value.shape, dtype=value.dtype, device=device)
                    held[name] = torch.nn.Parameter(moved, False) if held is part._parameters else moved
    add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(device)))
    attach_execution_device_hook(module, device)


def spread(family: str) -> LanguageModel:
    """The first block on one device, the second and the unembedding on another."""
    module = random_module(family, SIZES, 0)
    module.config.use_cache = False
    inner = module.get_decoder() if family != "gpt2" else module.transformer
    blocks = inner.h if family == "gpt2" else inner.layers
    for name, part in inner.named_children():
        if part is not blocks:
            put(part, THERE if "norm" in name or name == "ln_f" else HERE)
    put(blocks[0], HERE)
    put(blocks[1], THERE)
    put(module.get_output_embeddings(), THERE)
    return LanguageModel(around_any(module, family), family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_what_is_read_and_edited_is_on_one_device(family):
    with FakeTensorMode(), torch.no_grad():
        model = spread(family)
        home = model.device
        assert home == torch.device(THERE)
        tokens = torch.zeros(1, 6, dtype=torch.long, device=home)
        given: list[torch.device] = []

        def edit(value: torch.Tensor) -> torch.Tensor:
            given.append(value.device)
            return value + torch.ones(1, device=home)

        sites = [Site(0, "mlp_in"), Site(1, "mlp_in"), Site(1, "mlp_out")]
        logits, found = model.run(tokens, sites, {Site(0, "mlp_out"): edit, Site(1, "resid_pre"): edit})
        patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
        _, cache = model.run_hooked(tokens, read=patterns, write={patterns[0]: edit})
        seen = model.activations(tokens, sites)
        assert len(given) == 3
        assert set(given) == {home}
        for value in (logits, *found.values(), *cache.values(), *seen.values()):
            assert value.device == home


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_parts_give_what_is_on_the_device_of_what_they_get(family):
    with FakeTensorMode(), torch.no_grad():
        model = spread(family)
        home, parts = model.device, model.parts
        tokens = torch.zeros(1, 6, dtype=torch.long, device=home)
        with parts.recorded_calls() as calls:
            model.run(tokens)
        x = parts.embed(tokens)
        got = [x, parts.unembed(x)]
        assert parts.final_norm is not None
        for norm in [parts.final_norm, *(block.norm(name) for block in parts.blocks for name in ("ln1", "ln2"))]:
            if norm is not None:
                got += [norm(x), norm.linear(x[0]), norm.weight(torch.float64), norm.bias]
        for block, call in zip(parts.blocks, calls, strict=True):
            attention = block.attention
            got += [block.mlp(x), attention.run(x, call), *(attention.weight(kind) for kind in "QKVO")]
            got += [attention.bias(kind) for kind in "QKVO"]
            kinds = {kind: torch.einsum("bpd,hde->bphe", x, attention.weight(kind.upper())) for kind in "qkv"}
            got.append(attention.mixed(call, x, **kinds))
        assert [value.device for value in got if value is not None] == [home] * sum(v is not None for v in got)
