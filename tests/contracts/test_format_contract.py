"""Every format gives back what was saved, for every kind it holds, and says clearly what is wrong with a bad folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transcoders import CrossLayerTranscoder, load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import JumpReLU
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.formats.registry import FORMATS

NATIVE = [
    {"kind": kind, "activation": activation, **extra}
    for kind in ("plt", "clt", "sae")
    for activation in ("relu", "jumprelu", "topk")
    for extra in ({}, {"centred": True} if kind == "sae" else {"skip": True})
]
CIRCUIT_TRACER = [
    {"kind": "plt", "activation": "relu"},
    {"kind": "plt", "activation": "relu", "skip": True},
    {"kind": "plt", "activation": "jumprelu"},
    {"kind": "plt", "activation": "topk"},
    {"kind": "clt", "activation": "relu"},
    {"kind": "clt", "activation": "jumprelu"},
]
CASES = [("native", case) for case in NATIVE] + [("circuit-tracer", case) for case in CIRCUIT_TRACER]
IDS = ["-".join([name, *map(str, case.values())]) for name, case in CASES]


def test_every_format_has_cases():
    """Here, or in a file of its own where its conventions are another community's."""
    own = {path.stem.removeprefix("test_").replace("_", "-") for path in (Path(__file__).parent / "formats").iterdir()}
    assert {name for name, _ in CASES} | own >= set(FORMATS)


def reads():
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))


def build(case):
    return random_dictionaries(**case, n_layers=3, d_model=8, features=16, k=5, seed=7).requires_grad_(False)


def assert_same(loaded, original):
    assert type(loaded) is type(original)
    assert (loaded.kind, loaded.reads, loaded.writes) == (original.kind, original.reads, original.writes)
    found, expected = loaded.encode(reads()), original.encode(reads())
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(loaded.reconstruct(found, reads()), original.reconstruct(expected, reads()))


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_round_trip(tmp_path, name, case):
    original = build(case)
    save_dictionaries(original, tmp_path / "d", format=name)
    assert_same(load_dictionaries(tmp_path / "d"), original)


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_saving_twice_replaces_and_leaves_no_temporary_files(tmp_path, name, case):
    save_dictionaries(build(case).to(torch.float64), tmp_path, format=name)
    save_dictionaries(build(case), tmp_path, format=name)
    assert_same(load_dictionaries(tmp_path), build(case))
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_a_folder_holds_one_format(tmp_path):
    first, second = build({"kind": "clt", "activation": "relu"}), build({"kind": "plt", "activation": "relu"})
    save_dictionaries(first, tmp_path)
    with pytest.raises(InputError, match="in the format 'native'; save these to another folder"):
        save_dictionaries(second, tmp_path, format="circuit-tracer")
    assert_same(load_dictionaries(tmp_path), first)


@pytest.mark.parametrize("name", ["native", "circuit-tracer"])
def test_half_precision_storage_loads_in_the_precision_asked_for(tmp_path, name):
    original = build({"kind": "clt", "activation": "jumprelu"})
    assert isinstance(original, CrossLayerTranscoder)
    save_dictionaries(original, tmp_path / "full", format=name)
    save_dictionaries(original, tmp_path / "half", format=name, storage_dtype=torch.float16)
    size = {folder: sum(f.stat().st_size for f in (tmp_path / folder).iterdir()) for folder in ("full", "half")}
    assert size["half"] < 0.75 * size["full"]
    loaded = load_dictionaries(tmp_path / "half")
    assert isinstance(loaded, CrossLayerTranscoder)
    assert loaded.decoder_bias(0).dtype == torch.float32
    assert load_dictionaries(tmp_path / "half", dtype=torch.float64).decoder_bias(0).dtype == torch.float64
    every = torch.arange(16)
    torch.testing.assert_close(
        loaded.decoder_rows(0, every, 2), original.decoder_rows(0, every, 2), atol=1e-3, rtol=1e-3
    )
    assert isinstance(loaded.activation, JumpReLU)
    assert isinstance(original.activation, JumpReLU)
    # Thresholds and biases decide which features are on: they are stored as they are.
    assert torch.equal(loaded.activation.threshold, original.activation.threshold)
    assert torch.equal(loaded.encoder_biases(1, every), original.encoder_biases(1, every))


def test_provenance_survives_in_the_native_format(tmp_path):
    from dataclasses import replace

    from transcoders.sites import Frame

    original = build({"kind": "clt", "activation": "relu"})
    original.provenance = replace(
        original.provenance, fingerprint="abc", frame=Frame("folded"), corpus="text", tokens=5, config={"k": 3}
    )
    save_dictionaries(original, tmp_path)
    assert load_dictionaries(tmp_path).provenance == original.provenance


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="no dictionaries in a known format"):
        load_dictionaries(tmp_path)
    with pytest.raises(FileFormatError, match="There is no folder"):
        load_dictionaries(tmp_path / "absent")


@pytest.mark.parametrize("name", ["native", "circuit-tracer"])
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_a_truncated_file_is_named(tmp_path, name, kind):
    save_dictionaries(build({"kind": kind}), tmp_path, format=name)
    path = max(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match=f"{path.name} is not a safetensors file"):
        load_dictionaries(tmp_path)


@pytest.mark.parametrize(("name", "file"), [("native", "weights"), ("circuit-tracer", "W_enc_1")])
def test_a_missing_file_is_named(tmp_path, name, file):
    save_dictionaries(build({"kind": "clt"}), tmp_path, format=name)
    (tmp_path / f"{file}.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"W_enc|weights"):
        load_dictionaries(tmp_path)


def test_files_that_were_not_saved_together_are_refused(tmp_path):
    save_dictionaries(build({"kind": "clt"}), tmp_path / "a")
    save_dictionaries(build({"kind": "clt"}), tmp_path / "b")
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(FileFormatError, match="not saved together"):
        load_dictionaries(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lorsa"}, "'lorsa'"),
        ({"version": 99}, "version 99"),
        ({"n_layers": 5}, "5 layers"),
        ({"activation": {"name": "swish"}}, "'swish'"),
        ({"provenance": {"colour": 1}}, "does not describe"),
    ],
)
def test_a_native_config_that_does_not_match_is_refused(tmp_path, change, message):
    save_dictionaries(build({"kind": "clt"}), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileFormatError, match=message):
        load_dictionaries(tmp_path)


def _edit(path, change):
    """Replace the tensors of a file, its checksums with them."""
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "checksums"}
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def _spoilt(value):
    def change(tensors):
        for name in [name for name in tensors if "W_dec" in name or "threshold" in name][-1:]:
            tensors[name].view(-1)[-1] = value

    return change


DAMAGES = {
    "NaN": (_spoilt(torch.nan), "not a finite number"),
    "infinity": (_spoilt(torch.inf), "not a finite number"),
    "absurd": (_spoilt(3e38), "not a finite number below"),
    "integers": (lambda d: d.update({k: t.long() for k, t in d.items() if "W_enc" in k}), "in I64"),
    "one short": (lambda d: d.update({k: t[..., :-1] for k, t in d.items() if "b_enc" in k}), "b_enc"),
    "one dimension": (lambda d: d.update({k: t.flatten() for k, t in d.items() if "W_enc" in k}), "W_enc"),
    "no dimension": (lambda d: d.update({k: t.sum() for k, t in d.items() if "b_dec" in k}), "b_dec"),
    "empty": (lambda d: d.update({k: t[:0] for k, t in d.items() if "W_enc" in k}), "W_enc"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n, c in CASES if c["activation"] == "jumprelu" and "skip" not in c], ids=str
)
def test_damaged_tensors_are_named(tmp_path, name, case, damage):
    save_dictionaries(build(case), tmp_path, format=name)
    change, message = DAMAGES[damage]
    for path in tmp_path.glob("*.safetensors"):
        _edit(path, change)
    with pytest.raises(FileFormatError, match=message) as raised:
        load_dictionaries(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_a_flipped_bit_is_noticed(tmp_path, name, case):
    save_dictionaries(build(case), tmp_path, format=name)
    path = max(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="is damaged"):
        load_dictionaries(tmp_path)


def test_a_missing_or_surplus_threshold_is_named(tmp_path):
    save_dictionaries(build({"kind": "plt", "activation": "jumprelu"}), tmp_path)
    path = tmp_path / "weights.safetensors"
    _edit(path, lambda tensors: tensors.pop("1.activation.threshold"))
    with pytest.raises(FileFormatError, match=r"lacks 1\.activation\.threshold"):
        load_dictionaries(tmp_path)
    save_dictionaries(build({"kind": "plt", "activation": "relu"}), tmp_path)
    _edit(path, lambda tensors: tensors.update({"1.activation.threshold": torch.zeros(16)}))
    with pytest.raises(FileFormatError, match=r"has 1\.activation\.threshold, which its config"):
        load_dictionaries(tmp_path)


def test_mapped_decoders_are_judged_as_they_are_read(tmp_path):
    save_dictionaries(build({"kind": "clt", "activation": "relu"}), tmp_path)
    _edit(tmp_path / "weights.safetensors", lambda tensors: tensors["W_dec.0"][3].fill_(torch.nan))
    mapped = load_dictionaries(tmp_path, decoders="mapped")
    mapped.decoder_rows(0, torch.tensor([2, 4]), 1)
    with pytest.raises(DictionaryError, match="feature 3 has a weight that is not a finite number"):
        mapped.decoder_rows(0, torch.tensor([2, 3]), 1)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("native", "config.json", "[" * 100_000, "nests too deep"),
        ("native", "config.json", '{"format": "transcoders", "x": ' + "9" * 5000 + "}", "as JSON"),
        ("native", "config.json", "[1]", "expected an object"),
        ("native", "config.json", " " * (2**26 + 1), "more than the"),
        ("circuit-tracer", "config.yaml", "[" * 20_000, "nests too deep"),
        ("circuit-tracer", "config.yaml", "a: &a [1]\nb: *a\n", "aliases"),
        ("circuit-tracer", "config.yaml", "model_kind: 2024-99-99", "as YAML"),
        ("circuit-tracer", "config.yaml", "# " + "x" * 2**20, "more than the"),
        (
            "circuit-tracer",
            "config.yaml",
            "model_kind: [1]\nfeature_input_hook: [2]\nfeature_output_hook: [3]",
            "is not one of",
        ),
        ("circuit-tracer", "config.yaml", "\x00", "as YAML"),
    ],
)
def test_settings_beyond_all_measure(tmp_path, name, file, text, message):
    save_dictionaries(build({"kind": "plt"}), tmp_path, format=name)
    (tmp_path / file).write_text(text)
    with pytest.raises(FileFormatError, match=message) as raised:
        load_dictionaries(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 10**9}, "n_layers"),
        ({"n_layers": float("inf")}, "n_layers"),
        ({"n_layers": -1}, "n_layers"),
        ({"n_layers": "3"}, "n_layers"),
        ({"n_layers": True}, "n_layers"),
        ({"n_layers": 2}, "entries under 'reads' for 2 layers"),
        ({"reads": 3}, "reads"),
        ({"reads": ["x"] * 3}, "Cannot read site 'x'"),
        ({"activation": {"name": "jumprelu", "bandwidth": -1}}, "bandwidth"),
        ({"activation": {"name": "jumprelu", "bandwidth": float("nan")}}, "bandwidth"),
        ({"activation": {"name": "topk", "k": 2.5, "over_layers": True}}, "activation.k"),
        ({"activation": {"name": "topk", "k": 2}}, "over_layers"),
        ({"provenance": {"model": 7}}, "provenance.model"),
        ({"provenance": None}, "provenance"),
    ],
)
def test_native_settings_are_judged_before_weights_are_read(tmp_path, change, message):
    save_dictionaries(build({"kind": "clt", "activation": "jumprelu"}), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileFormatError, match=message):
        load_dictionaries(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("transcoder_set", "crosscoder", "'crosscoder'"),
        ("mlp.hook_in", "mlp.hook_pre", "feature_input_hook 'mlp.hook_pre', which is no place"),
        ("scan:", "transcoders: [layer_0.safetensors, layer_9.safetensors]\nscan:", "layer_9"),
    ],
)
def test_a_circuit_tracer_config_that_does_not_match_is_refused(tmp_path, old, new, message):
    save_dictionaries(build({"kind": "plt"}), tmp_path, format="circuit-tracer")
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(FileFormatError, match=message):
        load_dictionaries(tmp_path)


def test_circuit_tracer_shapes_are_checked(tmp_path):
    save_dictionaries(build({"kind": "plt"}), tmp_path, format="circuit-tracer")
    path = tmp_path / "layer_0.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "W_dec": tensors["W_dec"][:3].clone()}, path)
    with pytest.raises(FileFormatError, match=r"layer_0.*W_dec \[3, 8\]"):
        load_dictionaries(tmp_path)


@pytest.mark.parametrize("key", ["threshold", "activation_function.threshold"])
def test_circuit_tracer_thresholds_go_by_two_names(tmp_path, key):
    original = build({"kind": "plt", "activation": "jumprelu"})
    save_dictionaries(original, tmp_path, format="circuit-tracer")
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        tensors[key] = tensors.pop("activation_function.threshold")
        save_file(tensors, path)
    assert_same(load_dictionaries(tmp_path), original)


def test_circuit_tracer_applies_the_skip_matrix_transposed(tmp_path):
    original = build({"kind": "plt", "skip": True})
    save_dictionaries(original, tmp_path, format="circuit-tracer")
    stored = load_file(tmp_path / "layer_1.safetensors")["W_skip"]
    skip = original.skip(1)
    assert skip is not None
    assert torch.equal(stored, skip.T)


def test_the_reference_transcoders_load(shared):
    loaded = load_dictionaries(shared / "references/gpt2-mini-plt/transcoders")
    assert (loaded.kind, loaded.n_layers, loaded.d_model, loaded.n_features(0)) == ("plt", 3, 64, 256)
    assert str(loaded.reads[1]) == "1.mlp_in"
    assert str(loaded.writes[2]) == "2.mlp_out"
