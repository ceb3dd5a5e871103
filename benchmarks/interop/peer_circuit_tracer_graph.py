# pyright: reportMissingImports=false
"""circuit-tracer attributes a prompt on a random GPT-2 of three layers, in float64, with dictionaries of several sites.

peer_circuit_tracer_graph.py ROOT small|medium

ROOT/model/                       the model, as transformers saves it
ROOT/<case>/transcoders/          config.yaml and weights, as circuit-tracer has them
ROOT/<case>/attribution.npz       its graph: rows are targets; features, errors layer by layer, tokens, logits
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from peer_circuit_tracer import LAYERS, configure, cross_layer, load, single
from peer_truth import generator, normal


class Size(NamedTuple):
    """Of the model, its dictionaries and the prompt."""

    d_model: int
    features: int
    vocabulary: int
    tokens: int


SIZES = {"small": Size(8, 10, 24, 6), "medium": Size(32, 64, 100, 10)}
Case = tuple[str, str, str, dict[str, bool]]
CASES: dict[str, dict[str, Case]] = {
    "gpt2": {
        "clt_resid_mid": ("clt", "hook_resid_mid", "hook_mlp_out", {"jump": True}),
        "plt_normed": ("plt", "ln2.hook_normalized", "mlp.hook_out", {"jump": True}),
        "plt_normed_skip": ("plt", "ln2.hook_normalized", "hook_mlp_out", {"skip": True}),
        "plt_resid_mid_skip": ("plt", "hook_resid_mid", "mlp.hook_out", {"jump": True, "skip": True}),
    },
    "gemma2": {
        "clt_resid_mid": ("clt", "hook_resid_mid", "hook_mlp_out", {"jump": True}),
        "plt_normed": ("plt", "ln2.hook_normalized", "hook_mlp_out", {"jump": True}),
        "plt_mlp_in_skip": ("plt", "mlp.hook_in", "mlp.hook_out", {"jump": True, "skip": True}),
    },
}


def random_model(family: str, size: Size) -> Any:
    """A model in which every weight, bias and norm matters."""
    import transformers

    d = size.d_model
    if family == "gpt2":
        sizes: dict[str, Any] = {"n_layer": LAYERS, "n_head": 2, "n_embd": d, "n_inner": 4 * d, "n_positions": 16}
        config = transformers.GPT2Config(vocab_size=size.vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
        config.tie_word_embeddings = False
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        sizes = {"num_hidden_layers": LAYERS, "hidden_size": d, "intermediate_size": 3 * d, "head_dim": d // 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
        sizes |= {"query_pre_attn_scalar": d // 2, "sliding_window": 16}
        sizes["final_logit_softcapping"] = None  # circuit-tracer attributes logits before their cap, we after it
        config = transformers.Gemma2Config(vocab_size=size.vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
        model = transformers.Gemma2ForCausalLM(config).eval()
    source = generator(family)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        turned = family == "gpt2" and "transformer.h." in name  # its matrices are [in, out]
        scale = 0.2 if parameter.ndim == 1 else parameter.shape[0 if turned else 1] ** -0.5
        scale = {"transformer.wte.weight": 1.0, "transformer.wpe.weight": 0.3}.get(name, scale)
        mean = 1.0 if norm and family == "gpt2" else 0.0  # Gemma's norms multiply by one more than their weight
        parameter.data = mean + normal(source, *parameter.shape, scale=scale)
    return model


def _config(model: Any, size: Size) -> Any:
    """TransformerLens' own configuration for it."""
    from transformer_lens import HookedTransformerConfig

    theirs, d = model.config, size.d_model
    sizes: dict[str, Any] = {
        "n_layers": LAYERS, "d_model": d, "n_heads": 2, "d_head": d // 2, "n_ctx": 16, "d_vocab": size.vocabulary,
        "model_name": "random", "device": "cpu", "dtype": torch.float64,
    }  # fmt: skip
    if theirs.model_type == "gpt2":
        sizes |= {"d_mlp": theirs.n_inner, "act_fn": "gelu_new", "eps": theirs.layer_norm_epsilon}
        sizes |= {"normalization_type": "LN", "original_architecture": "GPT2LMHeadModel"}
    else:
        sizes |= {"d_mlp": theirs.intermediate_size, "act_fn": "gelu_pytorch_tanh", "eps": theirs.rms_norm_eps}
        sizes |= {"normalization_type": "RMS", "original_architecture": "Gemma2ForCausalLM", "gated_mlp": True}
        sizes |= {"positional_embedding_type": "rotary", "rotary_base": 10000, "rotary_dim": d // 2, "final_rms": True}
        sizes |= {"n_key_value_heads": 1, "use_normalization_before_and_after": True, "use_attn_scale": True}
        sizes |= {"attn_scores_soft_cap": theirs.attn_logit_softcapping}
    return HookedTransformerConfig(**sizes)


def replacement(model: Any, dictionaries: Any, size: Size) -> Any:
    """circuit-tracer's model over the same weights; its own way there asks the hub."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens.pretrained import weight_conversions

    config = _config(model, size)
    convert = {"gpt2": weight_conversions.convert_gpt2_weights, "gemma2": weight_conversions.convert_gemma_weights}
    made = TransformerLensReplacementModel(config, tokenizer=None)
    folded = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    made.load_and_process_state_dict(convert[model.config.model_type](model.double(), config), **folded)
    made.tokenizer = SimpleNamespace(
        all_special_ids=[0], bos_token_id=0, vocab_size=size.vocabulary, padding_side="right", decode=str
    )
    made._configure_replacement_model(dictionaries)
    return made


def write_case(root: Path, name: str, case: Case, model: Any, size: Size) -> None:
    """The dictionaries and the graph of one case."""
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_node_influence
    from circuit_tracer.transcoder import TranscoderSet

    kind, reads, writes, options = case
    folder = root / name / "transcoders"
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {"d": size.d_model, "n": size.features}
    if kind == "clt":
        cross_layer(name, **options, **sizes).to_safetensors(str(folder))
    else:
        made = {layer: single(name, layer, **options, **sizes) for layer in range(LAYERS)}
        TranscoderSet(made, reads, writes).to_safetensors(str(folder))
    configure(folder, "cross_layer_transcoder" if kind == "clt" else "transcoder_set", reads, writes)
    replaced = replacement(model, load(folder, torch.float64), size)
    tokens = torch.randint(1, size.vocabulary, (size.tokens,), generator=generator("prompt"))
    tokens[0] = 0
    graph = attribute(tokens, replaced, batch_size=64)
    n_logits = len(graph.logit_targets)
    at_logits = torch.zeros(len(graph.adjacency_matrix))
    at_logits[-n_logits:] = graph.logit_probabilities
    np.savez_compressed(
        root / name / "attribution.npz",
        adjacency=graph.adjacency_matrix.numpy(),
        active_features=graph.active_features.numpy(),
        activation_values=graph.activation_values.numpy(),
        selected_features=graph.selected_features.numpy(),
        tokens=tokens.numpy(),
        logit_ids=np.array([target.vocab_idx for target in graph.logit_targets]),
        logit_probs=graph.logit_probabilities.numpy(),
        node_influence=compute_node_influence(graph.adjacency_matrix, at_logits).numpy(),
    )


def main() -> None:
    root, size = Path(sys.argv[1]), SIZES[sys.argv[2]]
    for family, cases in CASES.items():
        model = random_model(family, size)
        model.save_pretrained(root / family / "model")
        for name, case in cases.items():
            write_case(root / family, name, case, model, size)


if __name__ == "__main__":
    main()
