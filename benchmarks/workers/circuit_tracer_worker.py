# pyright: reportMissingImports=false
"""Attributes one prompt with circuit-tracer and says what it cost. Run by `benchmarks/attribution.py`.

It runs in circuit-tracer's own environment, so it imports nothing of ours but `measuring`, beside it.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import answer, measure, touch


def load(task: dict[str, Any]) -> Any:
    """circuit-tracer's model over the same weights; its own loader asks the hub for the configuration."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    source = GPT2LMHeadModel.from_pretrained(task["model"], torch_dtype=torch.float32)
    theirs = source.config
    sizes: dict[str, Any] = {
        "n_layers": theirs.n_layer, "d_model": theirs.n_embd, "n_heads": theirs.n_head,
        "d_head": theirs.n_embd // theirs.n_head, "n_ctx": theirs.n_positions, "d_mlp": 4 * theirs.n_embd,
        "d_vocab": theirs.vocab_size, "act_fn": "gelu_new", "eps": theirs.layer_norm_epsilon,
        "normalization_type": "LN", "original_architecture": "GPT2LMHeadModel", "model_name": "random",
        "device": task.get("device", "cpu"),
    }  # fmt: skip
    config = HookedTransformerConfig(**sizes)
    model = TransformerLensReplacementModel(config, tokenizer=None)
    weights = convert_gpt2_weights(source, config)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    del source, weights
    model.tokenizer = _tokenizer(theirs.vocab_size)
    model._configure_replacement_model(_dictionaries(task))
    return model


def _dictionaries(task: dict[str, Any]) -> Any:
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    device = torch.device(task.get("device", "cpu"))
    sites = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out", "scan": "random"}
    loaded = {"device": device, "dtype": torch.float32, "lazy_encoder": False, "lazy_decoder": False}
    if task["kind"] == "clt":
        return load_clt(task["dictionaries"], **sites, **loaded)
    files = {i: f"{task['dictionaries']}/layer_{i}.safetensors" for i in range(task["n_layers"])}
    return load_transcoder_set(files, **sites, **loaded)


def _tokenizer(vocabulary: int) -> Any:
    """All that it asks of a tokenizer where tokens are given."""
    names: dict[str, Any] = {"all_special_ids": [0], "bos_token_id": 0, "vocab_size": vocabulary}
    return SimpleNamespace(**names, padding_side="right", decode=lambda ids: f"{ids}")


def save(graph: Any, task: dict[str, Any]) -> None:
    """Its edges under our names of the nodes; error and token nodes follow the features, logits come last."""
    n_tokens, n_layers = len(task["tokens"]), task["n_layers"]
    features = [f"{layer}.{feature}@{pos}" for layer, pos, feature in graph.active_features.tolist()]
    kept = [features[i] for i in graph.selected_features.tolist()]
    errors = [f"{layer}.err@{pos}" for layer in range(n_layers) for pos in range(n_tokens)]
    logits = [f"logit.{target.vocab_idx}@{n_tokens - 1}" for target in graph.logit_targets]
    ids = [*kept, *errors, *(f"tok@{pos}" for pos in range(n_tokens)), *logits]
    weights = graph.adjacency_matrix.detach().numpy()
    row, col = weights.nonzero()
    np.savez(task["out"], ids=np.array(ids), bias=np.zeros(len(ids), bool), row=row, col=col, weight=weights[row, col])


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    from circuit_tracer import attribute

    model, tokens = load(task), torch.tensor(task["tokens"])
    touch(model)
    graph, cost = measure(
        task["n_active"],
        task["d_model"],
        torch.float32,
        lambda: attribute(tokens, model, max_feature_nodes=task["max_features"], batch_size=task["batch_size"]),
    )
    save(graph, task)
    n_logits = len(graph.logit_targets)
    answer(**cost, edges=int((graph.adjacency_matrix != 0).sum()), n_logits=n_logits, version=version("circuit-tracer"))


if __name__ == "__main__":
    main()
