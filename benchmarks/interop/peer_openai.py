# pyright: reportMissingImports=false
"""OpenAI's sparse_autoencoder writes GPT-2 autoencoders in the folders of its paths.py, and reads any.

It is on no package index: PYTHONPATH has to hold a checkout that the user has made.
"""

from pathlib import Path

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, inputs, weights, write_truth

PACKAGE, K = "sparse_autoencoder", 5
PLACES = {
    "relu": "gpt2-small/resid_delta_mlp_v4/autoencoders/3.pt",
    "topk": "gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt",
    "topk_attention": "gpt2-small/resid_post_attn_v5_128k/autoencoders/11.pt",
    "relu_neurons": "gpt2-small/mlp_post_act/autoencoders/0.pt",
}


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction of the one .pt file in the folder."""
    from sparse_autoencoder.model import Autoencoder

    (path,) = files.rglob("*.pt")
    made = Autoencoder.from_state_dict(torch.load(path, weights_only=True)).double()
    with torch.no_grad():
        encoded, info = made.encode(x)
        return encoded, made.decode(encoded, info)


def _one(root: Path, variant: str, place: str) -> None:
    from sparse_autoencoder.model import Autoencoder, TopK

    top = variant.startswith("topk")
    given = weights(variant)
    activation = TopK(K) if top else torch.nn.ReLU()
    made = Autoencoder(FEATURES, D_MODEL, activation=activation, normalize=top)
    made.pre_bias.data, made.latent_bias.data = given["b_dec"], given["b_enc"]
    made.encoder.weight.data = given["W_enc"].T.contiguous()
    made.decoder.weight.data = given["W_dec"].T.contiguous()
    files = fresh(root, variant)
    (files / place).parent.mkdir(parents=True)
    state = made.state_dict()
    for twice in ("activation.k", "activation.postact_fn"):  # its loader refuses them: in no published file
        state.pop(twice, None)
    torch.save(state, files / place)
    x = inputs(variant)
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, file=place)


def write(root: Path) -> None:
    """ReLU as of versions 1 and 4, TopK with normalised inputs as of version 5."""
    for variant, place in PLACES.items():
        _one(root, variant, place)


if __name__ == "__main__":
    command(write, read)
