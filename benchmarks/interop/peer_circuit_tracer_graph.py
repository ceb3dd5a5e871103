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
CASES: dict[str, Case] = {
    "clt_resid_mid": ("clt", "hook_resid_mid", "hook_mlp_out", {"jump": True}),
    "plt_normed": ("plt", "ln2.hook_normalized", "mlp.hook_out", {"jump": True}),
    "plt_normed_skip": ("plt", "ln2.hook_normalized", "hook_mlp_out", {"skip": True}),
    "plt_resid_mid_skip": ("plt", "hook_resid_mid", "mlp.hook_out", {"jump": True, "skip": True}),
}


def random_model(size: Size) -> Any:
    """A GPT-2 in which every weight, bias and norm matters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    d = size.d_model
    config = GPT2Config(n_layer=LAYERS, n_head=2, n_embd=d, n_inner=4 * d, vocab_size=size.vocabulary, n_positions=16)
    for name in ("bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).eval()
    source = generator("gpt2")
    for name, parameter in model.named_parameters():
        fan_in = parameter.shape[0] if "transformer.h." in name else d
        scale = 0.2 if parameter.ndim == 1 else 0.3 if "wpe" in name else 1.0 if "wte" in name else fan_in**-0.5
        norm = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        parameter.data = norm + normal(source, *parameter.shape, scale=scale)
    return model


def replacement(model: Any, dictionaries: Any, size: Size) -> Any:
    """circuit-tracer's model over the same weights; its own way there asks the hub."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    theirs = model.config
    sizes: dict[str, Any] = {
        "n_layers": LAYERS, "d_model": size.d_model, "n_heads": theirs.n_head, "d_head": size.d_model // theirs.n_head,
        "n_ctx": theirs.n_positions, "d_mlp": theirs.n_inner, "d_vocab": size.vocabulary, "act_fn": "gelu_new",
        "eps": theirs.layer_norm_epsilon, "normalization_type": "LN", "original_architecture": "GPT2LMHeadModel",
        "model_name": "random", "device": "cpu", "dtype": torch.float64,
    }  # fmt: skip
    config = HookedTransformerConfig(**sizes)
    made = TransformerLensReplacementModel(config, tokenizer=None)
    folded = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    made.load_and_process_state_dict(convert_gpt2_weights(model.double(), config), **folded)
    made.tokenizer = SimpleNamespace(
        all_special_ids=[0], bos_token_id=0, vocab_size=size.vocabulary, padding_side="right", decode=str
    )
    made._configure_replacement_model(dictionaries)
    return made


def write_case(root: Path, name: str, model: Any, size: Size) -> None:
    """The dictionaries and the graph of one case."""
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_node_influence
    from circuit_tracer.transcoder import TranscoderSet

    kind, reads, writes, options = CASES[name]
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
    model = random_model(size)
    model.save_pretrained(root / "model")
    for name in CASES:
        write_case(root, name, model, size)


if __name__ == "__main__":
    main()
