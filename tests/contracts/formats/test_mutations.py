"""300 faults of each layout: one sentence or sound dictionaries, and never more memory than twice the files."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitsae.cli import main
from tests.contracts.formats.mutations import OVERHEAD, _Code, assert_refused_or_same, mutated
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, DictionarySet, SAESet, TranscoderSet
from transcoders.errors import DictionaryError
from transcoders.formats.registry import FORMATS
from transcoders.sites import Site, SiteKind

CASES, SEED = int(os.environ.get("FUZZ_CASES", "300")), int(os.environ.get("FUZZ_FIRST", "0"))
SITES: dict[str, list[tuple[SiteKind, SiteKind]]] = {
    "sae": [("resid_post", "resid_post"), ("mlp_out", "mlp_out"), ("mlp_added", "mlp_added"), ("attn_z", "attn_z")],
    "plt": [("mlp_in", "mlp_out"), ("resid_mid", "mlp_out"), ("mlp_in", "mlp_added"), ("mlp_normed", "mlp_out")],
    "clt": [("mlp_in", "mlp_out"), ("resid_mid", "mlp_out"), ("resid_mid", "mlp_added"), ("mlp_normed", "mlp_out")],
}


def candidates(kind: Any) -> Iterator[TranscoderSet | SAESet | CrossLayerTranscoder]:
    """Sets of a kind, of which a format may hold some."""
    for n_layers, sites, activation in itertools.product((2, 1), SITES[kind], ("jumprelu", "topk", "relu")):
        made = random_dictionaries(kind, activation=activation, n_layers=n_layers, d_model=8, features=12, k=3)
        read, write = ([Site(layer, site) for layer in range(n_layers)] for site in sites)
        if isinstance(made, CrossLayerTranscoder):
            made.reads, made.writes = tuple(read), tuple(write)
        else:
            for layer, dictionary in enumerate(made.layers):
                dictionary.read, dictionary.writes = read[layer], (write[layer],)
        yield made.requires_grad_(False)


def samples(name: str, place: Path) -> list[tuple[Path, DictionarySet]]:
    """Folders of what a format holds: one of each kind."""
    found: list[tuple[Path, DictionarySet]] = []
    for kind in SITES:
        for number, made in enumerate(candidates(kind)):
            try:
                save_dictionaries(made, place / f"{kind}-{number}", format=name)  # pyright: ignore[reportArgumentType]
            except DictionaryError:
                continue
            found.append((place / f"{kind}-{number}", made))
            break
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_faults_are_refused_in_a_sentence(tmp_path, name):
    folders = samples(name, tmp_path)
    assert folders, f"{name} saves none of the candidates"
    for seed, (folder, truth) in enumerate(folders):
        assert_refused_or_same(load_dictionaries, folder, truth, n=CASES // len(folders), seed=SEED + seed)


def test_faults_are_those_of_their_number(tmp_path):
    ((folder, _), *_) = samples("native", tmp_path)
    again, alone = list(mutated(folder, n=40)), list(mutated(folder, n=1, first=17))
    assert again == list(mutated(folder, n=40))
    assert alone == [again[17]]
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    differing = [fault for fault in again if fault.files != sound]
    assert len(differing) >= 38  # a byte may be replaced by itself, a file by its own content


def _spoilt(loaded: DictionarySet) -> DictionarySet:
    assert isinstance(loaded, torch.nn.Module)
    next(iter(loaded.parameters())).data.view(-1)[0] = torch.nan
    return loaded


def _wide(loaded: DictionarySet) -> DictionarySet:
    return random_dictionaries("sae", d_model=9)


def _unpickled(path: Path) -> DictionarySet:
    torch.save({"state_dict": _Code()}, path / "ae.pt")
    return torch.load(path / "ae.pt", weights_only=False)


BAD_LOADERS = {
    "another error": (lambda path: (_ for _ in ()).throw(KeyError("W_enc")), "KeyError"),
    "two lines": (lambda path: (_ for _ in ()).throw(DictionaryError("One.\nTwo.")), "no sentence"),
    "endless": (lambda path: (_ for _ in ()).throw(DictionaryError("x" * 601 + ".")), r"\(602\)"),
    "not finite": (lambda path: _spoilt(random_dictionaries("sae", d_model=8, features=12)), "not finite"),
    "another width": (lambda path: random_dictionaries("sae", d_model=9, features=12), "d_model 9"),
    "greedy": (lambda path: torch.empty(OVERHEAD + 2**20) and None, "took"),
    "trusting": (lambda path: _unpickled(path) and None, "code was run"),
    "careless": (lambda path: random_dictionaries("sae", d_model=8, features=12), "are refused"),
}


@pytest.mark.parametrize("bad", BAD_LOADERS)
def test_the_harness_finds_what_is_wrong(tmp_path, bad):
    """Each way in which a loader can be wrong, by one that is."""
    load, complaint = BAD_LOADERS[bad]
    ((folder, truth), *_) = samples("native", tmp_path)
    sound = itertools.chain([load_dictionaries], itertools.repeat(load))
    with pytest.raises(AssertionError, match=complaint):
        assert_refused_or_same(lambda path: next(sound)(path), folder, truth, n=12)


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_line_says_so_and_ends(tmp_path, capsys, name):
    """Exit code 2 with one sentence on stderr, or 0 with files written; never a traceback."""
    ((folder, _), *_) = samples(name, tmp_path)
    codes = []
    for fault in mutated(folder, n=8, seed=5):
        broken = fault.write(tmp_path / f"broken-{fault.number}")
        try:
            main(["convert", str(broken), str(tmp_path / f"out-{fault.number}")])
            codes.append(0)
        except SystemExit as left:
            codes.append(left.code)
        said = capsys.readouterr().err
        assert "Traceback" not in said, said
        assert (tmp_path / f"out-{fault.number}").exists() == (codes[-1] == 0), fault.what
        assert codes[-1] == 0 or said.count("error:") == 1, said
    assert set(codes) <= {0, 2}
    assert 2 in codes
