"""What others call our sites, by the families of models."""

from typing import Literal

import pytest
import torch
from transformers import AutoConfig, AutoModel

from transcoders.errors import FileFormatError
from transcoders.formats.hooks import added_site, has_layer_norm, module_of_site, normalised_site, site_of_module
from transcoders.sites import Site, SiteKind


@pytest.mark.parametrize("model", ["google/gemma-2-2b", "google/gemma-3-270m", "gemma2", "google/gemma-3-1b-it"])
def test_gemma_2_and_3_have_norms_after_the_mlp(model):
    assert added_site(model) == "mlp_added"
    assert module_of_site(Site(3, "resid_mid"), model, "in") == "layers.3.pre_feedforward_layernorm"
    with pytest.raises(FileFormatError, match="post_attention_layernorm"):
        site_of_module("model.layers.3.post_attention_layernorm", "in", model=model)


@pytest.mark.parametrize("model", ["google/gemma-2b", "google/gemma-2b-it", "google/gemma-7b", "google/codegemma-2b"])
def test_the_gemma_of_two_billion_parameters_is_no_gemma_2(model):
    assert added_site(model) == "mlp_out"
    assert module_of_site(Site(3, "resid_mid"), model, "in") == "layers.3.post_attention_layernorm"
    assert site_of_module("model.layers.3.post_attention_layernorm", "in", model=model) == Site(3, "resid_mid")


@pytest.mark.parametrize(
    ("model", "layer_norm"),
    [("gpt2", True), ("EleutherAI/pythia-70m", True), ("google/gemma-2b", False), ("meta-llama/Llama-3.2-1B", False),
     ("Qwen/Qwen3-0.6B", False), ("ibm-granite/granite-3.1-2b", False), ("google-t5/t5-small", False)],
)  # fmt: skip
def test_what_a_normalised_hook_carries_is_told_by_the_kind_of_norm(model, layer_norm):
    assert has_layer_norm(model) == layer_norm
    assert normalised_site(model) == ("mlp_in" if layer_norm else "mlp_normed")


PLACES: list[tuple[SiteKind, Literal["in", "out"]]] = [
    ("resid_pre", "in"), ("resid_post", "out"), ("mlp_in", "in"), ("mlp_out", "out"), ("attn_out", "out"),
    ("resid_mid", "in"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "model"),
    [("gpt2", "gpt2"), ("gpt_neox", "EleutherAI/pythia-70m"), ("bloom", "bigscience/bloom-560m"),
     ("llama", "meta-llama/Llama-3.2-1B"), ("gemma", "google/gemma-2b"), ("gemma2", "google/gemma-2-2b"),
     ("qwen2", "Qwen/Qwen2.5-0.5B"), ("falcon", "tiiuae/falcon-rw-1b")],
)  # fmt: skip
def test_modules_that_are_written_are_those_of_transformers(family, model):
    settings = {"parallel_attn": False, "new_decoder_architecture": False} if family == "falcon" else {}
    with torch.device("meta"):
        whole = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    for kind, side in PLACES:
        whole.get_submodule(name := module_of_site(Site(1, kind), model, side))
        assert site_of_module(name, side, model=model) == Site(1, kind)
