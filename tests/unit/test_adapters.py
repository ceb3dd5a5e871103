"""Adapters merged into weights, and quantised weights written out: what the model itself computes is the oracle."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import circuitsae
from circuitsae.cli import main
from circuitsae.graph import load_graph
from transcoders import adapters, load_model, random_dictionaries, save_dictionaries
from transcoders.errors import ModelError
from transcoders.random_models import random_module

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft: pip install peft")
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install bitsandbytes"
)
TOKENS = torch.tensor([[3, 11, 22, 5, 11, 7]])
SIZES: dict[str, int | None] = {
    "n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_head": 16, "d_mlp": 128, "d_vocab": 24,
    "context": 32,
}  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits if isinstance(model, torch.nn.Module) else model.run(TOKENS)[0]


@pytest.fixture
def folder(tmp_path, word_tokenizer):
    random_module("llama", SIZES, 0).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def lora(folder: Path, *, saved: bool = True, **settings: Any) -> Any:
    """A model of peft with a random LoRA; `adapter` beside the folder holds it."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(base(folder), LoraConfig(init_lora_weights=False, **chosen)).eval()
    if saved:
        model.save_pretrained(str(folder.with_name("adapter")))
    return model


# adapters


@needs_peft
def test_an_adapter_is_added_to_the_weights(folder):
    """W' = W + (α / r) B A, computed here in float64."""
    wrapped = lora(folder)
    model = load_model(folder, adapter=folder.with_name("adapter"), dtype="float64")
    ours = {name.replace("._original_component", ""): weight for name, weight in model.parts.weights()}
    plain = base(folder).double().state_dict()
    for name, weight in plain.items():
        expected = weight
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            part = wrapped.base_model.model.get_submodule(name.removesuffix(".weight"))
            a, b = part.lora_A["default"].weight.double(), part.lora_B["default"].weight.double()
            expected = weight + 6 / 4 * b @ a
            assert float((expected - weight).abs().max()) > 0.01
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(logits(model), logits(wrapped).double(), rtol=1e-4, atol=1e-5)
    assert model.origin == {"adapter": str(folder.with_name("adapter"))}


@needs_peft
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
     {"target_modules": "all-linear"}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": ["embed_tokens", "v_proj"]}],
    ids=str,
)  # fmt: skip
def test_a_model_with_an_adapter_in_memory_is_merged_and_stays_as_it_is(folder, settings):
    wrapped = lora(folder, saved=True, **settings).train()
    weights = {name: weight.clone() for name, weight in wrapped.state_dict().items()}
    gradients = [weight.requires_grad for weight in wrapped.parameters()]
    own = logits(wrapped.eval())
    wrapped.train()
    model = load_model(hf_model=wrapped)
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)
    assert wrapped.training
    assert [weight.requires_grad for weight in wrapped.parameters()] == gradients
    assert all(torch.equal(weight, weights[name]) for name, weight in wrapped.state_dict().items())
    assert torch.equal(logits(wrapped.eval()), own)
    again = load_model(folder, adapter=folder.with_name("adapter"))
    torch.testing.assert_close(logits(again), own, rtol=1e-4, atol=1e-5)


@needs_peft
def test_adapters_that_transformers_loaded_are_merged(folder):
    own = logits(lora(folder, modules_to_save=["lm_head"]))
    given = base(folder)
    given.load_adapter(str(folder.with_name("adapter")))
    torch.testing.assert_close(logits(given), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(load_model(hf_model=given)), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(given), own, rtol=1e-5, atol=1e-6)


@needs_peft
def test_only_what_is_active_is_merged_and_nothing_twice(folder):
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]

    wrapped = lora(folder, saved=False)
    first = logits(wrapped)
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    torch.testing.assert_close(logits(load_model(hf_model=wrapped)), first, rtol=1e-4, atol=1e-5)
    wrapped.set_adapter("other")
    second = logits(wrapped)
    torch.testing.assert_close(logits(load_model(hf_model=wrapped)), second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(load_model(hf_model=wrapped)), second, rtol=1e-4, atol=1e-5)


@needs_peft
def test_an_adapter_is_merged_into_a_model_in_memory(folder):
    own, given = logits(lora(folder)), base(folder)
    before = logits(given)
    model = load_model(hf_model=given, adapter=folder.with_name("adapter"))
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(given), before)


@needs_peft
def test_an_adapter_has_a_name_of_the_hub(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    own = logits(lora(folder))
    repository = tmp_path / "hub" / "models--some--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    folder.with_name("adapter").rename(repository / "snapshots" / ("a" * 40))
    model = load_model(folder, adapter="some/adapter")
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)
    assert model.origin == {"adapter": "some/adapter"}
    with pytest.raises(ModelError, match="The adapter 'other/adapter' is not on this machine"):
        load_model(folder, adapter="other/adapter")


@needs_peft
def test_a_graph_with_an_adapter_conserves_and_is_validated_with_it(folder, monkeypatch, capsys):
    lora(folder)
    monkeypatch.chdir(folder.parent)
    save_dictionaries(random_dictionaries("clt", d_model=64, features=48), folder.with_name("clt"))
    main(["trace", "w0 w3 w4 w5", "--model", "base", "--adapter", "adapter", "--dictionaries", "clt", "--dtype",
          "float64", "--validate", "3", "--out", "graph"])  # fmt: skip
    graph = load_graph("graph")
    assert graph.provenance["source"]["adapter"] == str(folder.with_name("adapter"))
    assert graph.provenance["model_origin"] == {"adapter": "adapter"}
    main(["validate", "graph", "--edges", "3"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "graph", "--edges", "3", "--model", "base"])
    assert stopped.value.code == 2
    model = circuitsae.load_model(folder, adapter="adapter", dtype="float64")
    made = circuitsae.ReplacementModel(model, circuitsae.load_dictionaries("clt"))
    full = circuitsae.attribute(made, "w0 w3 w4 w5")
    assert abs(full.residual()).max() / abs(full.weights).sum(axis=1).max() < 1e-9


@needs_peft
def test_what_does_not_fit_is_refused(folder):
    lora(folder)
    adapter = folder.with_name("adapter")
    deeper, wider = folder.with_name("deeper"), folder.with_name("wider")
    random_module("llama", {**SIZES, "n_layers": 3}, 0).save_pretrained(deeper)
    random_module("llama", {**SIZES, "d_mlp": 96}, 0).save_pretrained(wider)
    random_module("llama", {**SIZES, "n_layers": 1}, 0).save_pretrained(folder.with_name("shallow"))
    random_module("gpt2", SIZES, 0).save_pretrained(folder.with_name("gpt2"))
    for other in ("deeper", "wider", "shallow", "gpt2"):
        with pytest.raises(ModelError, match=rf"The adapter '.*adapter' does not fit this model.*made for {folder}"):
            load_model(folder.with_name(other), adapter=adapter)


@needs_peft
def test_adapters_of_the_prompt_are_refused(folder):
    from peft import PromptTuningConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    wrapped = get_peft_model(base(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    wrapped.save_pretrained(folder.with_name("prompt"))
    says = "PROMPT_TUNING, which adds vectors to the prompt and changes no weights; only adapters"
    with pytest.raises(ModelError, match=says):
        load_model(folder, adapter=folder.with_name("prompt"))
    with pytest.raises(ModelError, match=says):
        load_model(hf_model=wrapped)


@needs_peft
def test_files_that_are_no_adapter_are_refused(folder):
    lora(folder)
    adapter = folder.with_name("adapter")
    with pytest.raises(ModelError, match="There is no adapter at .*base: no adapter_config.json"):
        load_model(folder, adapter=folder)
    with pytest.raises(ModelError, match="There is no adapter at /nowhere/at/all"):
        load_model(folder, adapter="/nowhere/at/all")
    with pytest.raises(
        ModelError, match=r"holds an adapter, not a model; give the model it was made for, and adapter="
    ):
        load_model(adapter)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ModelError, match="cannot be read .*; save it again with save_pretrained"):
        load_model(folder, adapter=adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors \(pickles are not read\)"):
        load_model(folder, adapter=adapter)
    weights.write_bytes(whole)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "NEW_KIND"}))
    with pytest.raises(ModelError, match="cannot be read .*NEW_KIND"):
        load_model(folder, adapter=adapter)


def test_without_peft_its_name_is_said(folder, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="merged by the package peft, which is not installed; pip install peft"):
        load_model(folder, adapter="some/adapter")


# quantised


def quantised(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_the_numbers_they_stand_for(folder, bits):
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    given = base(folder, quantization_config=quantised(bits)).train()  # so run, bitsandbytes reorders nothing
    given.save_pretrained(folder.with_name("quantised"))
    expected = {}
    for name, part in given.named_modules():
        if "bitsandbytes" in type(part).__module__:
            weight = part.weight
            rows = (
                dequantize_4bit(weight.data, weight.quant_state)
                if bits == 4
                else weight.data * weight.SCB[:, None] / 127
            )
            expected[f"{name}.weight"] = rows.double()
    assert len(expected) == 14
    plain = base(folder).double().state_dict()
    for model in (
        load_model(folder, quantization_config=quantised(bits), dtype="float64"),
        load_model(folder.with_name("quantised"), dtype="float64", tokenizer=folder),
        load_model(hf_model=given, dtype="float64"),
    ):
        assert model.origin == {"quantisation": f"bitsandbytes {bits}-bit"}
        ours = {name.replace("._original_component", ""): weight for name, weight in model.parts.weights()}
        for name, weight in plain.items():
            assert ours[name].dtype == torch.float64
            torch.testing.assert_close(ours[name], expected.get(name, weight), rtol=1e-6, atol=1e-6)
            assert name not in expected or float((ours[name] - weight).abs().max()) > 1e-4
        dictionaries = random_dictionaries("plt", d_model=64, features=48, dtype=torch.float64)
        graph = circuitsae.attribute(circuitsae.ReplacementModel(model, dictionaries), TOKENS[0])
        assert abs(graph.residual()).max() / abs(graph.weights).sum(axis=1).max() < 1e-9
        assert graph.provenance["model_origin"] == model.origin
    assert "bitsandbytes" in type(given.model.layers[0].mlp.up_proj).__module__, "the model that was given was changed"


def test_eight_bit_floats_are_the_numbers_they_stand_for(folder):
    """Blocks of 32 × 32 with a scale each, `W = q · s`; needs no package."""
    from safetensors.torch import save_file

    state, expected = base(folder).state_dict(), {}
    for name in [name for name in state if name.endswith("proj.weight")]:
        blocks = state[name].unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
        scales = blocks.abs().amax((1, 3)) / 448
        q = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        expected[name] = (q.float() * scales[:, None, :, None]).reshape(state[name].shape)
        state |= {name: q.reshape(state[name].shape), name.replace("weight", "weight_scale_inv"): scales}
    save_file(
        {name: weight.contiguous() for name, weight in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    model = load_model(folder, dtype="float64")
    assert model.origin == {"quantisation": "fp8"}
    ours = {name.replace("._original_component", ""): weight for name, weight in model.parts.weights()}
    assert len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight.double(), rtol=1e-6, atol=1e-7)


def test_weights_that_cannot_be_written_out_are_refused(folder):
    class Packed:
        def dequantize(self, model: Any, dtype: Any) -> Any:
            raise NotImplementedError

    given = base(folder)
    given.is_quantized, given.hf_quantizer = True, Packed()
    given.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="quantised by gptq, which transformers cannot undo; give the model without"):
        load_model(hf_model=given)
    narrow = base(folder)
    part = narrow.model.layers[0].mlp.up_proj
    part.weight = torch.nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"mlp.up_proj.weight is stored as float8_e4m3fn values, which cannot be read"):
        load_model(hf_model=narrow)


@needs_bitsandbytes
def test_four_bits_that_were_reordered_are_refused(folder):
    given = base(folder, quantization_config=quantised(4)).requires_grad_(False).eval()
    given(TOKENS)
    if not getattr(given.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("needs a processor with AVX512-BF16, where bitsandbytes reorders weights")
    for _ in range(2):  # state_dict() puts them back, but not their scales
        with pytest.raises(
            ModelError, match="has been run on the CPU.*; load it again, and give it before its first run"
        ):
            load_model(hf_model=given)
        given.state_dict()


@needs_peft
@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_quantised_weights_is_not_rounded_away(folder, bits):
    from peft import PeftModel  # pyright: ignore[reportMissingImports]

    lora(folder)
    adapter = folder.with_name("adapter")
    how = {"quantization_config": quantised(bits)}
    wrapped = PeftModel.from_pretrained(base(folder, **how), str(adapter)).train()
    in_memory, by_name = load_model(hf_model=wrapped), load_model(folder, adapter=adapter, **how)
    assert torch.equal(logits(in_memory), logits(by_name))
    if bits == 4:  # with eight, bitsandbytes rounds what the layer reads, too
        torch.testing.assert_close(logits(in_memory), logits(wrapped), rtol=1e-4, atol=1e-5)
    without = load_model(folder, **how)
    plain, merged = (dict(model.parts.weights()) for model in (without, in_memory))
    delta = {name: merged[name] - plain[name] for name in plain if "v_proj" in name or "down_proj" in name}
    first = lora(folder, saved=False).base_model.model.model.layers[0].mlp.down_proj
    expected = first.get_delta_weight("default")
    (name,) = [name for name in delta if "layers.0." in name and "down_proj" in name][:1]
    torch.testing.assert_close(delta[name], expected, rtol=1e-4, atol=1e-6)
    assert in_memory.origin["quantisation"] == f"bitsandbytes {bits}-bit"
