# pyright: reportMissingImports=false
"""crosslayer-transcoder writes its models with every nonlinearity and standardiser, and reads any.

It is on no package index: PYTHONPATH has to hold a checkout that the user has made.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, generator, inputs, normal, weights, write_truth

PACKAGE, LAYERS, K = "crosslayer-transcoder", 3, 5


def _without_training() -> None:
    """Its packages' `__init__` import the training with h5py and nnsight; the models need neither."""
    place = find_spec("crosslayer_transcoder")
    if place is None or place.origin is None:
        raise SystemExit("Put a checkout of crosslayer-transcoder on PYTHONPATH.")
    for name in ("crosslayer_transcoder", "crosslayer_transcoder.model"):
        module = ModuleType(name)
        module.__path__ = [str(Path(place.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features at inference (BatchTopK by its threshold) and reconstruction."""
    from crosslayer_transcoder.model.clt import CrossLayerTranscoder
    from crosslayer_transcoder.model.topk import TopK

    made = CrossLayerTranscoder.from_pretrained(files).double()
    across = x.transpose(0, 1)
    ways = (made.input_standardizer, made.output_standardizer)
    for way in filter(None, ways):
        way.is_initialized = True  # its loader forgets
    with torch.no_grad():
        hidden = made.encoder(ways[0](across) if ways[0] else across)
        if isinstance(made.nonlinearity, TopK):
            layers = [made.nonlinearity(hidden[:, i : i + 1], layer=i) for i in range(LAYERS)]
            encoded = torch.cat(layers, dim=1)
        else:
            encoded = made.nonlinearity(hidden)
        decoded = made.decoder(encoded)
        decoded = ways[1](decoded) if ways[1] else decoded
    return encoded.transpose(0, 1), decoded.transpose(0, 1)


def _standardisers(kind: str | None, name: str) -> tuple[Any, Any]:
    from crosslayer_transcoder.model import standardize as known

    if kind is None:
        return None, None
    if kind == "samplewise":
        return known.SamplewiseInputStandardizer(), None
    sizes = {"dimensionwise": (LAYERS, D_MODEL), "layerwise": (LAYERS,)}[kind]
    pair = [getattr(known, f"{kind.capitalize()}{way}Standardizer")(*sizes) for way in ("Input", "Output")]
    source = generator(name + "/standard")
    for one in pair:
        one.mean.data = normal(source, *sizes, scale=0.5)
        one.std.data = 0.5 + normal(source, *sizes).abs()
    return pair[0], pair[1]


def _nonlinearity(kind: str, name: str) -> Any:
    from crosslayer_transcoder.model import jumprelu, topk

    if kind == "jumprelu":
        made = jumprelu.JumpReLU(0.03, 1.0, LAYERS, FEATURES)
        made.theta.data = torch.stack([weights(f"{name}/{i}")["threshold"] for i in range(LAYERS)])[None]
        return made
    if kind == "relu":
        return jumprelu.ReLU()
    made = getattr(topk, kind)(k=K, e=0.01, n_layers=LAYERS)
    if hasattr(made, "threshold"):
        made.threshold.copy_(torch.linspace(0.2, 0.5, len(made.threshold)))
    return made


def _one(root: Path, variant: str, kind: str, standard: str | None, *, across: bool = True, fold: bool = True) -> None:
    from crosslayer_transcoder.model.clt import CrosslayerDecoder, CrossLayerTranscoder, Decoder, Encoder

    sizes = (D_MODEL, FEATURES, LAYERS)
    encoder, decoder = Encoder(*sizes), (CrosslayerDecoder if across else Decoder)(*sizes)
    made = CrossLayerTranscoder(_nonlinearity(kind, variant), encoder, decoder, *_standardisers(standard, variant))
    layers = range(LAYERS)
    each = [weights(f"{variant}/{i}") for i in layers]
    encoder.W.data = torch.stack([given["W_enc"] for given in each])
    encoder.b.data = torch.stack([given["b_enc"] for given in each])
    decoder.b.data = torch.stack([given["b_dec"] for given in each])
    if across:
        for target in layers:
            to = [weights(f"{variant}/{source}>{target}")["W_dec"] for source in range(target + 1)]
            decoder.get_parameter(f"W_{target}").data = torch.stack(to)
    else:
        decoder.W.data = torch.stack([given["W_dec"] for given in each])
    files = fresh(root, variant)
    made.save_pretrained(files, fold_standardizers=fold)
    x = inputs(variant, LAYERS)
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, layers=LAYERS, reads="the input of ln_2")


def write(root: Path) -> None:
    """Every nonlinearity once, every standardiser once as it is and where possible folded."""
    _one(root, "jumprelu", "jumprelu", "dimensionwise")
    _one(root, "jumprelu_unfolded", "jumprelu", "dimensionwise", fold=False)
    _one(root, "relu_layerwise", "relu", "layerwise", fold=False)
    _one(root, "relu_samplewise", "relu", "samplewise", fold=False)
    _one(root, "topk", "PerLayerTopK", None)
    _one(root, "batch_topk", "BatchTopK", "dimensionwise")
    _one(root, "layer_batch_topk", "PerLayerBatchTopK", None)
    _one(root, "per_layer", "jumprelu", "dimensionwise", across=False)


if __name__ == "__main__":
    _without_training()
    command(write, read)
