"""circuit-tracer's files of weights: the tensors of a layer in whichever of the layouts, under our names.

The layouts are described in `circuit_tracer`. Shapes are judged before anything is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from transcoders.errors import FileFormatError, InputError
from transcoders.formats.circuit_tracer_sets import TracerSet, across_names
from transcoders.formats.files import read_tensors, tensor_shapes
from transcoders.formats.weights import Reading, Weights, open_weights

Shapes = dict[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class LayerFile:
    """The file of one layer, in whichever of the layouts: our names for its tensors."""

    weights: Weights
    names: dict[str, str]
    """Its name for each of our tensors."""
    by_column: bool
    """Gemma Scope: encoders as `[d_model, feature]`, skip terms as `x A`."""
    writes: int = 0
    """Layers that its decoder writes to, for cross-layer ones."""

    @classmethod
    def of(cls, path: Path, reading: Reading, writes: int = 0) -> "LayerFile":
        if path.suffix == ".npz":
            if reading.decoders == "mapped":
                raise InputError(
                    f"The decoders of {path} cannot stay in an npz file; load them into memory (decoders='memory')."
                )
            weights = open_weights(path)
        else:
            weights = Weights(path, tensor_shapes(path))
        second = "w_enc" in weights.shapes
        names = {"W_enc": "w_enc", "W_dec": "w_dec"} if second else {"W_enc": "W_enc", "W_dec": "W_dec"}
        names |= {"b_enc": "b_enc", "b_dec": "b_dec"}
        skip = "affine_skip_connection" if second else "W_skip"
        by_column = second or path.suffix == ".npz"
        optional = [("threshold", "threshold"), ("threshold", "activation_function.threshold")]
        optional += [("W_skip", skip), ("k", "k")]
        names |= {ours: theirs for ours, theirs in optional if theirs in weights.shapes}
        if by_column:  # always JumpReLU
            names["threshold"] = "threshold"
        return cls(weights, names, by_column=by_column, writes=writes)

    @property
    def path(self) -> Path:
        return self.weights.path

    def require(self, sizes: dict[str, int]) -> None:
        """Raises `FileFormatError` unless the shapes are those of a layer; `sizes` are what all layers share."""
        encoder = ("d_model", "feature") if self.by_column else ("feature", "d_model")
        decoder = ("feature", self.writes, "d_model") if self.writes else ("feature", "d_model")
        shapes: Shapes = {
            "W_enc": encoder, "b_enc": ("feature",), "W_dec": decoder, "b_dec": ("d_model",),
            "W_skip": ("d_model", "d_model"),
        }  # fmt: skip
        self.weights.require({self.names[name]: shape for name, shape in shapes.items() if name in self.names}, sizes)
        _require_threshold(self.weights, self.names.get("threshold"), sizes["feature"])

    def read(self, reading: Reading) -> dict[str, Tensor]:
        """Our tensors, with encoders as `[d_model, feature]` and skip terms as `x W_skip`."""
        tensors = _read(self.weights, self.names, reading)
        if not self.by_column:
            tensors |= {name: tensors[name].T.contiguous() for name in ("W_enc", "W_skip") if name in tensors}
        return tensors


def _read(weights: Weights, names: Mapping[str, str], reading: Reading) -> dict[str, Tensor]:
    """Tensors under our names; decoders may stay in the file."""
    if weights.path.suffix == ".npz":
        found = weights.read(names.values(), reading)
    else:
        W_dec = names.get("W_dec") if reading.decoders == "mapped" else None
        found, _ = read_tensors(
            weights.path,
            dtype=reading.dtype,
            device=reading.device,
            mapped=lambda name: name == W_dec,
            weights=True,
            wanted=set(names.values()).__contains__,
        )
    for name, tensor in found.items():
        if not tensor.is_floating_point() and name != "k":
            raise FileFormatError(
                f"{weights.path} has {name} in {tensor.dtype}; expected floating-point numbers, so download or save it "
                "again."
            )
    return {ours: found[theirs] for ours, theirs in names.items()}


def _require_threshold(weights: Weights, name: str | None, n_features: int) -> None:
    """One threshold for each feature, or one for all."""
    if name is None:
        return
    if name not in weights.shapes:
        raise FileFormatError(f"{weights.path} lacks {name}; check that this is the right file.")
    shape = weights.shapes[name]
    if not (shape in ((), (1,), (n_features,)) or shape == (1, n_features)):
        raise FileFormatError(
            f"{weights.path} has {name} {list(shape)}, but its other tensors ask for [{n_features}]; download or save "
            "it again."
        )


def thresholds_of(tensors: Mapping[str, Tensor]) -> Float[Tensor, "feature"]:
    return tensors["threshold"].flatten().expand_as(tensors["b_enc"]).clone()


@dataclass(frozen=True)
class CrossLayerFile:
    """The two files of one layer in circuit-tracer's own layout."""

    layer: int
    encoder: Weights
    decoder: Weights
    writes: int

    @property
    def _names(self) -> dict[str, str]:
        optional = [name for name in ("threshold", "W_skip") if f"{name}_{self.layer}" in self.encoder.shapes]
        return {name: f"{name}_{self.layer}" for name in ("W_enc", "b_enc", "b_dec", *optional)}

    @property
    def path(self) -> Path:
        return self.encoder.path

    def require(self, sizes: dict[str, int]) -> None:
        shapes: Shapes = {
            "W_enc": ("feature", "d_model"), "b_enc": ("feature",), "b_dec": ("d_model",),
            "W_skip": ("d_model", "d_model"),
        }  # fmt: skip
        names = self._names
        self.encoder.require({names[name]: shape for name, shape in shapes.items() if name in names}, sizes)
        _require_threshold(self.encoder, names.get("threshold"), sizes["feature"])
        self.decoder.require({f"W_dec_{self.layer}": ("feature", self.writes, "d_model")}, sizes)

    def read(self, reading: Reading) -> dict[str, Tensor]:
        tensors = _read(self.encoder, self._names, reading)
        tensors |= _read(self.decoder, {"W_dec": f"W_dec_{self.layer}"}, reading)
        return tensors | {"W_enc": tensors["W_enc"].T}


def cross_layer_files(found: TracerSet, reading: Reading) -> Sequence[CrossLayerFile | LayerFile]:
    """The files of all layers, their headers read."""
    if found.config.get("transcoders") is not None:
        entries = found.entries()
        layers = _all_layers(found, entries, "under 'transcoders'")
        paths = found.fetched(entries)
        return [LayerFile.of(paths[layer], reading, writes=len(layers)) for layer in layers]
    names = found.numbered(across_names("enc")), found.numbered(across_names("dec"))
    layers = _all_layers(found, names[0], "as W_enc_I.safetensors")
    _all_layers(found, names[1], "as W_dec_I.safetensors", len(layers))
    paths = found.source.fetch(found.within(of_layer[layer]) for of_layer in names for layer in layers)
    opened = [Weights(path, tensor_shapes(path)) for path in paths]
    encoders, decoders = opened[: len(layers)], opened[len(layers) :]
    return [CrossLayerFile(layer, encoders[layer], decoders[layer], len(layers) - layer) for layer in layers]


def _all_layers(found: TracerSet, files: Mapping[int, str], how: str, n_layers: int | None = None) -> range:
    """The layers that have files, which must be all of them: a decoder's shape speaks of the layers after its own."""
    layers = range((max(files) + 1 if files else 1) if n_layers is None else n_layers)
    missing = next((layer for layer in layers if layer not in files), None)
    if missing is not None or len(files) > len(layers):
        raise FileFormatError(
            f"{found.label} has {len(files)} files {how} and none for layer {missing}; a cross-layer transcoder has "
            "W_enc_I.safetensors and W_dec_I.safetensors for every layer I, so download the folder again."
        )
    return layers
