"""Models as people have them: in memory, of a revision, with code of their own, spread over devices, under other names.

What transformers computes of the same weights is the oracle.
"""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import circuitsae
import transcoders
from circuitsae.cli import main
from circuitsae.graph import load_graph
from transcoders import LanguageModel, load_model, random_dictionaries, save_dictionaries
from transcoders.errors import DictionaryError, InputError, ModelError, PromptError
from transcoders.random_models import random_module

TOKENS = torch.tensor([[3, 11, 22, 5, 11, 7]])
SIZES: dict[str, int | None] = {
    "n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_mlp": 24, "d_vocab": 24, "context": 32,
}  # fmt: skip
FAMILIES = ["gpt2", "opt", "gptj", "gpt_neox", "bloom", "mpt", "llama", "mixtral", "gemma2", "gemma3", "qwen3", "olmo"]


def module(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    return random_module(family, SIZES, seed).to(dtype)


def saved(folder: Path, tokenizer: Any = None, *, seed: int = 0) -> Path:
    module(seed=seed, dtype=torch.float32).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.run(TOKENS)[0] if isinstance(model, LanguageModel) else model(TOKENS).logits


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub on a machine without a network; `add` puts a folder into it under a name and revisions."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def add(name: str, folder: Path, commit: str, *refs: str) -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = repository / "blobs" / f"{commit[:4]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
        for ref in refs:
            (repository / "refs" / ref).write_text(commit)

    return add


# in memory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_memory_is_wrapped_and_stays_as_it_is(family):
    given = module(family, dtype=torch.float32)
    given.set_attn_implementation("eager" if family in ("mpt", "bloom", "gemma2") else "sdpa")  # no soft caps in sdpa
    own = logits(given)
    given.train().requires_grad_(True)
    before = {
        "kinds": [type(part) for part in given.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in given.modules()],
        "attention": given.config._attn_implementation,
        "config": given.config.to_dict(),
        "buffers": [name for name, _ in given.named_buffers()],
    }
    weights = {name: weight.clone() for name, weight in given.state_dict().items()}

    model = load_model(hf_model=given)
    ours = logits(model)
    model.run(TOKENS, edits={transcoders.Site(0, "mlp_out"): torch.zeros_like})

    assert float((ours - own).abs().max() / own.abs().max()) < 1e-5
    assert given.training
    assert all(weight.requires_grad for weight in given.parameters())
    after = {
        "kinds": [type(part) for part in given.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in given.modules()],
        "attention": given.config._attn_implementation,
        "config": given.config.to_dict(),
        "buffers": [name for name, _ in given.named_buffers()],
    }
    assert after == before
    assert all(torch.equal(weight, weights[name]) for name, weight in given.state_dict().items())
    assert torch.equal(logits(given.eval()), own)


def test_weights_are_shared_so_that_training_shows():
    given = module(dtype=torch.float32).train()
    model = load_model(hf_model=given)
    assert model.W_U.data_ptr() == given.lm_head.weight.data_ptr()
    before, earlier = model.fingerprint(), logits(model)
    optimiser = torch.optim.AdamW(given.parameters(), lr=0.1)
    given(TOKENS, labels=TOKENS).loss.backward()
    optimiser.step()
    assert model.fingerprint() != before
    assert not torch.allclose(logits(model), earlier)
    torch.testing.assert_close(logits(model), logits(given), rtol=1e-5, atol=1e-5)
    assert all(weight.grad is None for _, weight in model.parts.parameters())


def test_hooks_of_a_model_in_memory_are_left_with_it():
    given, seen = module(dtype=torch.float32), []
    given.enable_input_require_grads()  # as for training adapters: a hook on the embedding
    given.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    given.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    own = given(TOKENS, output_hidden_states=True)
    assert len(seen) == 2
    model = load_model(hf_model=given)
    logits, _ = model.run(TOKENS)
    assert len(seen) == 2
    assert not logits.requires_grad
    torch.testing.assert_close(logits, own.logits, rtol=1e-5, atol=1e-5)
    again = given(TOKENS, output_hidden_states=True)
    assert len(seen) == 4
    assert all(map(torch.equal, own.hidden_states, again.hidden_states))


def test_converting_ours_leaves_theirs():
    given = module(dtype=torch.float32)
    model = load_model(hf_model=given).to("float64")
    assert (model.dtype, given.dtype) == (torch.float64, torch.float32)


def test_tied_weights_stay_tied():
    given = module("gpt2")
    model = load_model(hf_model=given)
    weights = dict(model.parts.weights())
    tied = [weights[name].data_ptr() for name in weights if re.search(r"(wte|lm_head)\..*weight", name)]
    assert len(tied) == 2
    assert len(set(tied)) == 1


def test_a_graph_of_a_model_in_memory_conserves():
    model = circuitsae.load_model(hf_model=module(), name="mine")
    dictionaries = random_dictionaries("clt", d_model=16, features=24, dtype=torch.float64)
    graph = circuitsae.attribute(circuitsae.ReplacementModel(model, dictionaries), TOKENS[0])
    scale = abs(graph.weights).sum(axis=1).max()
    assert abs(graph.residual()).max() / scale < 1e-9
    assert graph.provenance["model"] == "mine"
    assert "model_origin" not in graph.provenance


def test_names_of_a_model_in_memory(tmp_path):
    assert load_model(hf_model=module()).name == "LlamaForCausalLM"
    assert load_model("tuned", hf_model=module()).name == "tuned"
    folder = saved(tmp_path / "from-here")
    assert load_model(hf_model=AutoModelForCausalLM.from_pretrained(folder)).name == "from-here"


def test_texts_are_read_with_the_tokenizer_that_is_given(tmp_path, word_tokenizer):
    tokenizer = word_tokenizer()
    settings = json.dumps(sorted(tokenizer.special_tokens_map.items()))
    model = load_model(hf_model=module(), tokenizer=tokenizer)
    assert model.to_tokens("w0 w3 w4").tolist() == [22, 5, 6]
    assert json.dumps(sorted(tokenizer.special_tokens_map.items())) == settings, "the tokenizer was changed"
    tokenizer.save_pretrained(tmp_path / "words")
    assert load_model(hf_model=module(), tokenizer=tmp_path / "words").to_tokens("w0 w3").tolist() == [22, 5]
    with pytest.raises(PromptError, match=r"has no tokenizer; give token ids .* or load the model with tokenizer=…"):
        load_model(hf_model=module()).to_tokens("w0")


class Tuned(LlamaForCausalLM):
    """As people derive from a class of transformers."""


def test_a_class_derived_from_one_that_is_known_is_known():
    torch.manual_seed(0)
    given = Tuned(LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=4)).double().eval()  # fmt: skip
    torch.testing.assert_close(logits(load_model(hf_model=given)), logits(given), rtol=1e-6, atol=1e-6)


def test_a_compiled_model_is_the_model_that_was_compiled():
    given = module()
    torch.testing.assert_close(logits(load_model(hf_model=torch.compile(given))), logits(given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.nn.Linear(2, 2), "hf_model is a Linear; expected a causal language model of transformers"),
        ("gpt2", "hf_model is a str; expected"),
        (module().model, "hf_model is a LlamaModel; expected"),
        (module().to("meta"), r"holds no weights for .* \(device 'meta'\)"),
    ],
)
def test_what_is_no_language_model_is_refused(given, says):
    with pytest.raises(ModelError, match=says):
        load_model(hf_model=given)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"revision": "main"}, "in memory already, but revision='main' says how to load one; leave it out"),
        ({"trust_remote_code": True}, "trust_remote_code=True says how to load"),
        ({"device_map": "auto"}, "device_map='auto' says how to load"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config=.* says how to load"),
        ({"dtype": "bfloat16"}, r"holds float64 weights, but dtype is bfloat16; .*hf_model.to\(torch.bfloat16\)"),
        ({"dtype": "float64", "torch_dtype": torch.float32}, "are two precisions; give one of them"),
        ({"device": "cuda:77"}, "'cuda:77' cannot be used here"),
        ({"tokenizer": 3}, "tokenizer is a int; expected one of transformers"),
        ({"tokenizer": "/nowhere"}, "no model folder at /nowhere"),
    ],
)
def test_arguments_that_contradict_a_model_in_memory_are_refused(arguments, says):
    with pytest.raises(ModelError, match=says):
        load_model(hf_model=module(), **arguments)


def test_a_name_of_another_model_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    with pytest.raises(ModelError, match="The model 'model' has model_type llama, but hf_model has gpt2"):
        load_model(folder, hf_model=module("gpt2"))
    deeper = random_module("llama", {**SIZES, "n_layers": 3}, 0)
    with pytest.raises(ModelError, match="has num_hidden_layers 2, but hf_model has 3; leave the name out"):
        load_model(folder, hf_model=deeper)
    assert load_model(folder, hf_model=module()).name == "model"


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(word_tokenizer):
    small = random_module("llama", {**SIZES, "d_vocab": 20}, 0)
    with pytest.raises(
        ModelError, match="The tokenizer has 24 tokens, but LlamaForCausalLM only 20; give the tokenizer"
    ):
        load_model(hf_model=small, tokenizer=word_tokenizer())


def test_nothing_named_is_refused():
    with pytest.raises(ModelError, match="No model was named; give a hub name or a folder, or hf_model="):
        load_model()


# by name


@pytest.mark.parametrize(
    "arguments", [{"dtype": "float64"}, {"torch_dtype": torch.float64}, {"torch_dtype": "float64"}]
)
def test_the_older_name_of_dtype_works(tmp_path, arguments):
    assert load_model(saved(tmp_path / "model"), **arguments).dtype == torch.float64


def test_a_folder_without_a_tokenizer_takes_tokens_or_the_one_that_is_given(tmp_path, word_tokenizer):
    folder = saved(tmp_path / "model")
    model = load_model(folder)
    assert not model.has_tokenizer
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert load_model(folder, tokenizer=word_tokenizer()).to_tokens("w0").tolist() == [22]


def test_a_revision_is_of_its_own_weights(tmp_path, hub, word_tokenizer):
    first, second = saved(tmp_path / "1", word_tokenizer()), saved(tmp_path / "2", word_tokenizer(), seed=1)
    hub("some/model", first, "a" * 40, "main")
    hub("some/model", second, "b" * 40, "v2")
    latest, tagged = load_model("some/model"), load_model("some/model", revision="v2")
    commit = circuitsae.load_model("some/model", revision="b" * 40)
    for model, folder in ((latest, first), (tagged, second), (commit, second)):
        assert model.name == "some/model"
        assert model.to_tokens("w0").tolist() == [22]
        torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert (latest.origin, tagged.origin, commit.origin) == ({}, {"revision": "v2"}, {"revision": "b" * 40})
    with pytest.raises(ModelError, match="The revision 'v3' of the model 'some/model' is not on this machine"):
        load_model("some/model", revision="v3")
    with pytest.raises(ModelError, match=r"is a folder, of which there is no revision 'v2'; leave the revision out"):
        load_model(first, revision="v2")


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("transcoders.hub.hub_problem", lambda: None)

    def settings(source, revision):
        asked.append((source, revision))
        raise OSError("no such revision")

    monkeypatch.setattr("transcoders.hf_models.settings_of", settings)
    with pytest.raises(ModelError, match="Could not load the model 'some/model' .no such revision.; check the name"):
        load_model("some/model", revision="v2")
    assert asked == [("some/model", "v2")]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class {config}(LlamaConfig):
    model_type = "{kind}"

class {model}(LlamaForCausalLM):
    config_class = {config}

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("ran", __import__("torch").ones(1), persistent=False)
"""


def with_code(folder: Path, tokenizer: Any, *, kind: str, model: str, config: str | None) -> Path:
    """A checkpoint that brings Python code of its own."""
    saved(folder, tokenizer)
    name = f"code_{kind.replace('-', '_')}"
    (folder / f"{name}.py").write_text(CODE.format(kind=kind, model=model, config=config or "OwnConfig"))
    settings = json.loads((folder / "config.json").read_text())
    places = {"AutoModelForCausalLM": f"{name}.{model}"} | ({"AutoConfig": f"{name}.{config}"} if config else {})
    settings |= {"model_type": kind, "architectures": [model], "auto_map": places}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("kind", "model", "config"),
    [("ownkind", "OwnForCausalLM", "OwnConfig"), ("otherkind", "LlamaForCausalLM", "OtherConfig")],
)
def test_code_of_the_repository_is_run_only_where_it_is_trusted(
    tmp_path, monkeypatch, capsys, word_tokenizer, hub, kind, model, config
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tmp_path / "model", word_tokenizer(), kind=kind, model=model, config=config)
    hub("some/model", folder, "a" * 40, "main")
    says = rf"some/model runs Python code of its own repository \(code_{kind}.{model}\); .* trust_remote_code=True"
    with pytest.raises(ModelError, match=says):
        load_model("some/model")
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "w0 w3", "--model", "some/model"])
    assert stopped.value.code == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "modules").exists()
    loaded = load_model("some/model", trust_remote_code=True)
    plain = module(dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-5, atol=1e-5)
    assert loaded.to_tokens("w0").tolist() == [22]
    assert "ran" in str(loaded.bridge) or any(name.endswith("ran") for name, _ in loaded.bridge.named_buffers())


def test_a_class_of_ones_own_under_a_known_kind_is_not_silently_another(tmp_path, word_tokenizer):
    folder = with_code(tmp_path / "model", word_tokenizer(), kind="llama", model="ChangedLlama", config=None)
    with pytest.raises(ModelError, match=r"runs Python code of its own repository \(code_llama.ChangedLlama\)"):
        load_model(folder)


def test_code_that_the_library_has_by_now_is_not_needed(tmp_path, word_tokenizer):
    folder = with_code(tmp_path / "model", word_tokenizer(), kind="llama", model="LlamaForCausalLM", config="OwnConfig")
    torch.testing.assert_close(logits(load_model(folder)), logits(module(dtype=torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "device_map",
    [{"": "cpu"}, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu",
                   "model.rotary_emb": "cpu", "lm_head": "cpu"}, "auto", "sequential"],
)  # fmt: skip
def test_a_model_may_be_spread_over_devices(tmp_path, word_tokenizer, device_map):
    folder = saved(tmp_path / "model", word_tokenizer())
    model = load_model(folder, device_map=device_map)
    torch.testing.assert_close(logits(model).cpu(), logits(AutoModelForCausalLM.from_pretrained(folder)))
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    torch.testing.assert_close(logits(load_model(hf_model=spread)), logits(model))
    with pytest.raises(ModelError, match=r"Give device='cpu' or device_map=.*, not both"):
        load_model(folder, device_map=device_map, device="cpu")


def test_a_map_to_no_device_is_refused(tmp_path, word_tokenizer):
    folder = saved(tmp_path / "model", word_tokenizer())
    with pytest.raises(ModelError, match="Could not load the model .*meta"):
        load_model(folder, device_map={"": "meta"})


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_checkpoint_quantised_by_a_package_that_is_not_here_names_it(tmp_path, word_tokenizer, settings, package):
    if find_spec(package) is not None:
        pytest.skip(f"needs a machine without {package}")
    folder = saved(tmp_path / "model", word_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(
        ModelError, match=rf"needs a package that is not installed \(.*{package}.*\); install it with pip"
    ):
        load_model(folder)


# the names that users of other libraries type


def test_a_model_has_the_names_of_transformer_lens(tmp_path):
    folder = saved(tmp_path / "model")
    for load in (LanguageModel.from_pretrained, LanguageModel.boot_transformers):
        assert isinstance(load(folder), LanguageModel)
        assert load(folder, torch_dtype="float64").dtype == torch.float64
        assert load(hf_model=module()).name == "LlamaForCausalLM"


def test_a_replacement_model_has_the_name_of_circuit_tracer(tmp_path):
    folder = saved(tmp_path / "model")
    save_dictionaries(random_dictionaries("clt", d_model=16, features=24), tmp_path / "clt")
    made = circuitsae.ReplacementModel.from_pretrained(folder, tmp_path / "clt", dtype=torch.float64)
    assert isinstance(made, circuitsae.ReplacementModel)
    assert (made.model.dtype, made.dictionaries.kind) == (torch.float64, "clt")
    lazy = circuitsae.ReplacementModel.from_pretrained(folder, tmp_path / "clt", lazy_decoder=True)
    assert isinstance(lazy.dictionaries, transcoders.dictionaries.MappedDictionaries)
    with pytest.raises(InputError, match="There is no backend 'nnsight'"):
        circuitsae.ReplacementModel.from_pretrained(folder, tmp_path / "clt", backend="nnsight")


def test_dictionaries_have_the_names_of_sae_lens(tmp_path, monkeypatch):
    kinds = {"sae": transcoders.SAESet, "plt": transcoders.TranscoderSet, "clt": transcoders.CrossLayerTranscoder}
    for kind, cls in kinds.items():
        save_dictionaries(random_dictionaries(kind, d_model=16, features=24), tmp_path / kind)  # pyright: ignore
        assert isinstance(cls.from_pretrained(tmp_path / kind, dtype="float64"), cls)
    with pytest.raises(DictionaryError, match="holds a SAESet, not a TranscoderSet; load_dictionaries takes either"):
        transcoders.TranscoderSet.from_pretrained(tmp_path / "sae")
    with pytest.raises(DictionaryError, match="holds 2 dictionaries; name one with sae_id"):
        transcoders.SAE.from_pretrained(tmp_path / "sae")
    one = random_dictionaries("sae", n_layers=1, d_model=16, features=24)
    save_dictionaries(one, tmp_path / "one")
    sae = transcoders.SAE.from_pretrained(tmp_path / "one")
    assert isinstance(sae, transcoders.SAE)
    assert torch.equal(sae.W_enc, one[0].W_enc)
    with pytest.raises(DictionaryError, match="holds a SAE, not a Transcoder"):
        transcoders.Transcoder.from_pretrained(tmp_path / "one")
    asked: list[Any] = []
    monkeypatch.setattr(transcoders.formats, "load_dictionaries", lambda name, **how: asked.append((name, how)) or one)
    transcoders.SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre", device="cpu")
    assert asked == [("gpt2-small-res-jb", {"sae_id": "blocks.8.hook_resid_pre", "device": "cpu"})]


# what is kept of it


@pytest.fixture
def two_revisions(tmp_path, hub, word_tokenizer, monkeypatch):
    hub("some/model", saved(tmp_path / "1", word_tokenizer()), "a" * 40, "main")
    hub("some/model", saved(tmp_path / "2", word_tokenizer(), seed=1), "b" * 40, "v2")
    save_dictionaries(random_dictionaries("clt", d_model=16, features=24), tmp_path / "clt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_graph_keeps_the_revision_and_is_validated_with_it(two_revisions, capsys):
    options = ["--model", "some/model", "--dictionaries", "clt", "--validate", "3"]
    main(["trace", "w0 w3 w4 w5", *options, "--revision", "v2", "--trust-remote-code", "--out", "tagged"])
    main(["trace", "w0 w3 w4 w5", *options, "--out", "latest"])
    tagged, latest = load_graph("tagged"), load_graph("latest")
    assert tagged.provenance["model_origin"] == {"revision": "v2"}
    assert tagged.provenance["source"]["revision"] == "v2"
    assert "trust" not in json.dumps(dict(tagged.provenance)), "a graph must not make others run code"
    assert "model_origin" not in latest.provenance
    assert "revision" not in latest.provenance["source"]
    assert tagged.provenance["fingerprint"] != latest.provenance["fingerprint"]
    capsys.readouterr()
    main(["validate", "tagged", "--edges", "3"])
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "tagged", "--edges", "3", "--revision", "main"])
    assert stopped.value.code == 2
    assert "validate it with the model it was made with" in " ".join(capsys.readouterr().err.split())


def test_trained_dictionaries_keep_the_revision(two_revisions):
    (two_revisions / "text.txt").write_text("\n\n".join(" w1 w2 w3 w4 w5 w6 w7" for _ in range(40)))
    main(["train", "some/model", "--revision", "v2", "--corpus", "text.txt", "--kind", "plt", "--features", "16",
          "--tokens", "400", "--context", "8", "--batch", "64", "--evaluate-tokens", "0", "--out", "mine"])  # fmt: skip
    provenance = transcoders.load_dictionaries("mine").provenance
    assert provenance.model_origin == {"revision": "v2"}
    assert provenance.fingerprint == load_model("some/model", revision="v2").fingerprint()
    assert provenance.fingerprint != load_model("some/model").fingerprint()


def test_a_device_map_stands_in_for_the_device(two_revisions):
    options = ["--model", "some/model", "--dictionaries", "clt", "--validate", "0"]
    main(["trace", "w0 w3 w4 w5", *options, "--device-map", "auto", "--out", "spread"])
    assert load_graph("spread").provenance["model"] == "some/model"


def test_transformers_is_asked_for_its_own_version_of_what_it_has():
    """`own_code` rests on these names of transformers."""
    assert "llama" in transformers.CONFIG_MAPPING
    assert hasattr(transformers, "LlamaForCausalLM")
    assert not hasattr(transformers, "ChangedLlama")
