"""What every format that writes has in common: what is rounded, and that no frame is lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts.formats.test_mutations import samples
from transcoders import load_dictionaries, save_dictionaries
from transcoders.errors import DictionaryError
from transcoders.formats.registry import FORMATS
from transcoders.formats.weights import as_stored, open_weights
from transcoders.sites import Frame

MATRICES = [
    "W_enc", "3.W_dec", "W_dec.2", "W_decs.0", "W_skips.1", "W_dec_11", "w_enc", "w_dec", "affine_skip_connection",
    "encoder.weight", "decoder.weight", "encoder.W", "decoder.W_2", "W_skip",
]  # fmt: skip
VECTORS = [
    "b_enc", "0.b_dec", "b_dec.1", "threshold_3", "activation.threshold", "nonlinearity.theta", "log_threshold",
    "encoder.bias", "encoder.b", "decoder.b", "latent_bias", "pre_bias", "post_encs.0", "layer_mask",
    "estimated_norm_scaling_factor_in",
]  # fmt: skip


def test_matrices_alone_are_rounded():
    value = torch.tensor([1 / 3])
    found = as_stored(dict.fromkeys(MATRICES + VECTORS, value), torch.bfloat16)
    assert [name for name, tensor in found.items() if tensor.dtype == torch.bfloat16] == MATRICES
    assert all(tensor is value for tensor in as_stored(dict.fromkeys(MATRICES, value), None).values())


@pytest.mark.parametrize("name", FORMATS)
def test_half_the_precision_is_half_the_matrices_and_the_same_thresholds(tmp_path, name):
    for number, (folder, made) in enumerate(samples(name, tmp_path)):
        save_dictionaries(made, half := tmp_path / f"half-{number}", format=name, storage_dtype="float16")
        exact, rounded = (_tensors(place) for place in (folder, half))
        assert exact.keys() == rounded.keys()
        differing = {key.rpartition(":")[2] for key in exact if not torch.equal(exact[key], rounded[key])}
        assert differing == {key.rpartition(":")[2] for key in exact} & stored_names(exact)
        a, b = (load_dictionaries(place, dtype=torch.float64) for place in (folder, half))
        reads = torch.randn(a.n_layers, 5, a.d_model, generator=torch.Generator().manual_seed(1)).double()
        a, b = (each.reconstruct(each.encode(reads), reads) for each in (a, b))
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def stored_names(tensors):
    names = dict.fromkeys((key.rpartition(":")[2] for key in tensors), torch.zeros(()))
    return {name for name, tensor in as_stored(names, torch.float16).items() if tensor.dtype == torch.float16}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".npz", ".pt"):
            weights = open_weights(path)
            found |= {f"{path.relative_to(folder)}:{name}": weights._stored(name) for name in weights.shapes}
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_frame_is_kept_or_refused(tmp_path, name):
    for number, (_, made) in enumerate(samples(name, tmp_path)):
        made.provenance = replace(made.provenance, frame=Frame("folded"))
        place = tmp_path / f"folded-{number}"
        if FORMATS[name].keeps_frame:
            save_dictionaries(made, place, format=name)
            continue
        with pytest.raises(DictionaryError, match=r"trained in the 'folded' frame; use one of \(native, saelens\)"):
            save_dictionaries(made, place, format=name)
        assert not place.exists()
