# pyright: reportMissingImports=false
"""dictionary_learning's trainers write every class they have, and its loader reads any. Run by `run.py`.

The trainers do no step: `trainSAE` makes them, and writes configuration and weights as after a training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, inputs, only, weights, write_truth

PACKAGE, LAYER, K, THRESHOLD = "dictionary-learning", 1, 5, 0.35
BUFFER = {"d_submodule": D_MODEL, "io": "out", "n_ctxs": 100, "ctx_len": 16, "refresh_batch_size": 8}
BUFFER |= {"out_batch_size": 64, "device": "cpu"}


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction of the class that config.json names, as its own loader gives it."""
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(only(files, "ae.pt")), "cpu")
    with torch.no_grad():
        encoded = dictionary.double().encode(x)
        return encoded, dictionary.decode(encoded)


def _raw(files: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features of an AutoEncoder before its loader makes the decoder's norms one, which scales them."""
    from dictionary_learning.dictionary import AutoEncoder

    dictionary = AutoEncoder.from_pretrained(files / "ae.pt", normalize_decoder=False)
    with torch.no_grad():
        return {"encoded_raw": dictionary.double().encode(x)}


def _fill(dictionary: Any, name: str, unit: bool, threshold: float) -> None:
    """Our numbers under their names; trainers that constrain the decoder leave rows of norm one."""
    given = weights(name)
    if unit:
        given["W_dec"] = given["W_dec"] / given["W_dec"].norm(dim=1, keepdim=True)
    turned = {"encoder.weight": given["W_enc"].T.contiguous(), "decoder.weight": given["W_dec"].T.contiguous()}
    biases = {"encoder.bias": given["b_enc"], "bias": given["b_dec"], "decoder_bias": given["b_dec"]}
    biases["decoder.bias"] = given["b_dec"]
    gates = {"gate_bias": given["b_enc"], "mag_bias": given["b_enc"].flip(0), "r_mag": 0.5 * given["threshold"] - 0.2}
    known = {**given, **turned, **biases, **gates}
    for key, parameter in dictionary.named_parameters():
        parameter.data.copy_(known[key])
    if "threshold" in dict(dictionary.named_buffers()):
        dictionary.threshold.fill_(threshold)


def _trained(
    root: Path, variant: str, trainer: Any, *, unit: bool = False, threshold: float = THRESHOLD, **options: Any
) -> None:
    from dictionary_learning.training import trainSAE

    class Filled(trainer):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            _fill(self.ae, variant, unit, threshold)

    files = fresh(root, variant)
    config = {"trainer": Filled, "steps": 10, "activation_dim": D_MODEL, "dict_size": FEATURES, "layer": LAYER}
    config |= {"lm_name": "openai-community/gpt2", "device": "cpu", "submodule_name": f"resid_post_layer_{LAYER}"}
    config |= {"warmup_steps": 1, "sparsity_warmup_steps": 1, **options}
    config = {key: value for key, value in config.items() if value is not None}
    trainSAE(Batches(), [config], steps=0, save_dir=str(files), device="cpu")
    _finish(root, variant, files / "trainer_0")


class Batches(list):
    """No batches, with the description that a buffer of activations has."""

    config = BUFFER


def _finish(root: Path, variant: str, files: Path) -> None:
    x = inputs(variant)
    folder = files.relative_to(root / variant / "files")
    raw = _raw(files, x.double()) if variant == "standard_april" else {}
    write_truth(
        root, variant, x, read(files, x.double()), PACKAGE, folders=[str(folder)], layer=LAYER, site="resid_post", **raw
    )


def _new(root: Path, variant: str) -> None:
    """`AutoEncoderNew`, which its loader knows, though no trainer of this version writes the name."""
    from dictionary_learning.dictionary import AutoEncoderNew

    files = fresh(root, variant)
    dictionary = AutoEncoderNew(D_MODEL, FEATURES)
    _fill(dictionary, variant, False, THRESHOLD)
    torch.save(dictionary.state_dict(), files / "ae.pt")
    said = {"dict_class": "AutoEncoderNew", "trainer_class": "StandardTrainerNew", "activation_dim": D_MODEL}
    said |= {"dict_size": FEATURES, "layer": LAYER, "lm_name": "EleutherAI/pythia-70m-deduped"}
    (files / "config.json").write_text(json.dumps({"trainer": said, "buffer": BUFFER}, indent=4))
    _finish(root, variant, files)


def write(root: Path) -> None:
    """Every class and trainer."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    plain: dict[str, Any] = {"sparsity_warmup_steps": None, "k": K}
    _trained(root, "standard", trainers.StandardTrainer, unit=True)
    _trained(root, "standard_april", StandardTrainerAprilUpdate)
    _trained(root, "p_anneal", trainers.PAnnealTrainer, unit=True)
    _trained(root, "gated", trainers.GatedSAETrainer, unit=True)
    _trained(root, "gated_anneal", trainers.GatedAnnealTrainer, unit=True, submodule_name=None)
    _trained(root, "jumprelu", trainers.JumpReluTrainer)
    _trained(root, "top_k", trainers.TopKTrainer, unit=True, **plain)
    _trained(root, "batch_top_k", trainers.BatchTopKTrainer, unit=True, **plain)
    _trained(root, "batch_top_k_early", trainers.BatchTopKTrainer, unit=True, threshold=-1.0, **plain)
    groups: dict[str, Any] = {"group_fractions": [0.25, 0.25, 0.5]}
    _trained(root, "matryoshka_batch_top_k", MatryoshkaBatchTopKTrainer, unit=True, **plain, **groups)
    _new(root, "new")


if __name__ == "__main__":
    command(write, read)
