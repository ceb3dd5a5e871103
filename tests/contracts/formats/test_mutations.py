"""300 faults of each layout: one sentence or sound dictionaries, and never more memory than twice the files."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contracts.formats.mutations import OVERHEAD, _Code, assert_refused_or_same, mutated
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import DictionarySet
from transcoders.errors import DictionaryError
from transcoders.formats.registry import FORMATS

CASES, SEED = int(os.environ.get("FUZZ_CASES", "300")), int(os.environ.get("FUZZ_FIRST", "0"))
SAMPLES: list[dict[str, Any]] = [
    {"kind": kind, "activation": activation}
    for kind in ("sae", "plt", "clt")
    for activation in ("jumprelu", "topk", "relu")
]


def samples(name: str, place: Path) -> list[tuple[Path, DictionarySet]]:
    """Folders of what a format can hold: at most one of each kind."""
    found: dict[str, tuple[Path, DictionarySet]] = {}
    for number, case in enumerate(SAMPLES):
        made = random_dictionaries(**case, n_layers=2, d_model=8, features=12, k=3, seed=number).requires_grad_(False)
        folder = place / f"{number}"
        try:
            save_dictionaries(made, folder, format=name)  # pyright: ignore[reportArgumentType]
        except DictionaryError:
            continue
        found.setdefault(case["kind"], (folder, made))
    return list(found.values())


@pytest.mark.parametrize("name", FORMATS)
def test_faults_are_refused_in_a_sentence(tmp_path, name):
    folders = samples(name, tmp_path)
    assert folders, f"{name} saves none of {SAMPLES}"
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
