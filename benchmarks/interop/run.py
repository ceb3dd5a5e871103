"""Claim: dictionaries of other communities are read here as their own packages read them, and they read ours.

    python -m benchmarks.interop.run                 makes the environments (some 8 GB), then checks; `make interop`
    python -m benchmarks.interop.run --write         first lets the peers write tests/golden/dictionaries anew
    python -m benchmarks.interop.run --checkouts openai@4965b94=~/sparse_autoencoder …

Each peer encodes and decodes with the files it wrote, this package with the same files, and the peer with what this
package makes of them in the same format. Differences are the largest, relative to the largest number, in float64.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import tyro
from safetensors.torch import load_file

from benchmarks.interop.compare import TOLERANCE, Answer, hub_of, ours, theirs
from benchmarks.interop.environments import FROM_CHECKOUTS, PEERS, Peer, with_checkouts
from transcoders import load_dictionaries, save_dictionaries
from transcoders.errors import CircuitsaeError
from transcoders.formats.registry import Wanted, format_of
from transcoders.formats.source import open_source

TESTS = Path(__file__).parents[2] / "tests" / "golden"
RESULTS = Path(__file__).parents[1] / "results" / "interop.md"


@dataclass
class Options:
    """What to run."""

    peers: list[str] = field(default_factory=list)
    """Communities; by default all that can be run."""
    checkouts: list[str] = field(default_factory=list)
    """`NAME@VERSION=FOLDER` of peers that are on no package index."""
    write: bool = False
    """Let the peers write the files of the tests anew."""


class Variant(NamedTuple):
    """One dictionary or set that a peer wrote, and what it says of it."""

    folder: Path
    x: torch.Tensor
    truth: Answer
    said: dict[str, Any]

    @property
    def layered(self) -> bool:
        return self.truth.encoded.ndim == 3

    @property
    def choice(self) -> Wanted:
        """What its files may not say."""
        return {"site": self.said.get("site"), "layers": self.said.get("layer")}

    @classmethod
    def read(cls, place: Path) -> "Variant":
        tensors = load_file(place / "truth.safetensors")
        truth = Answer(tensors["encoded"], tensors["decoded"])
        return cls(place / "files", tensors["x"], truth, json.loads((place / "truth.json").read_text()))


class Check(NamedTuple):
    """Of one way of reading all variants of a community."""

    differences: dict[str, float]
    refused: dict[str, str]

    def cell(self) -> str:
        """How many agree, and the largest difference."""
        total = len(self.differences) + len(self.refused)
        agree = sum(difference <= TOLERANCE for difference in self.differences.values())
        most = f", {max(self.differences.values()):.0e}" if self.differences else ""
        return f"{agree} of {total}{most}" if total else "–"

    def sentences(self) -> list[str]:
        """What is not as it should be."""
        apart = [f"{name}: differs by {one:.0e}" for name, one in self.differences.items() if one > TOLERANCE]
        return apart + [f"{name}: {' '.join(text.split())[:300]}" for name, text in sorted(self.refused.items())]


def write(peer: Peer, community: str) -> None:
    """The files of the tests, by the peer."""
    with TemporaryDirectory() as temporary:
        peer.run("write", temporary)
        shutil.rmtree(TESTS / "dictionaries" / community, ignore_errors=True)
        shutil.copytree(temporary, TESTS / "dictionaries" / community)


def variants(community: str) -> dict[str, Variant]:
    """What lies in the folder of the tests."""
    places = sorted((TESTS / "dictionaries" / community).iterdir())
    return {place.name: Variant.read(place) for place in places if (place / "truth.json").exists()}


def read_by(peer: Peer, folders: dict[str, Path], known: dict[str, Variant]) -> Check:
    """The peer's answers against its truth."""
    answers = theirs(peer, {name: (folder, known[name].x) for name, folder in folders.items()})
    refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    given = {name: answer for name, answer in answers.items() if isinstance(answer, Answer)}
    return Check({name: known[name].truth.difference(answer) for name, answer in given.items()}, refused)


def each(known: dict[str, Variant], do: Callable[[str, Variant], float | None]) -> Check:
    """What `do` finds of each variant; our errors are sentences of the table."""
    differences, refused = {}, {}
    for name, variant in known.items():
        try:
            with hub_of(variant.folder.parent / "others"):
                found = do(name, variant)
        except CircuitsaeError as error:
            refused[name] = str(error).replace(str(variant.folder), name)
        else:
            if found is not None:
                differences[name] = found
    return Check(differences, refused)


def read_here(name: str, variant: Variant) -> float:
    """Our answer against the peer's."""
    wanted: Wanted = {**variant.choice, "dtype": "float64"}
    dictionaries = load_dictionaries(variant.folder, **wanted)
    return ours(dictionaries, variant.x, layered=variant.layered).difference(variant.truth)


def write_here(known: dict[str, Variant], to: Path) -> Check:
    """Every variant read and written again in its own format; no difference is found here, but a refusal may be."""

    def again(name: str, variant: Variant) -> None:
        form = format_of(open_source(variant.folder)).name
        dictionaries = load_dictionaries(variant.folder, **variant.choice)
        save_dictionaries(dictionaries, to / name / "files", format=form)
        shutil.copy(variant.folder.parent / "truth.json", to / name)

    return each(known, again)


def check(community: str, peer: Peer) -> tuple[list[str], list[str]]:
    """A row of the table, and sentences of what is peculiar and what was refused."""
    known = variants(community)
    said = next(iter(known.values())).said
    itself = read_by(peer, {name: variant.folder for name, variant in known.items()}, known)
    here = each(known, read_here)
    with TemporaryDirectory() as temporary:
        again = write_here({name: known[name] for name in here.differences}, Path(temporary))
        written = {path.parent.name: path for path in Path(temporary).glob("*/files")}
        back = read_by(peer, written, known)
        back = Check(back.differences, back.refused | again.refused)
    ways = {"reads its own": itself, "is read here": here, "reads ours": back}
    notes = [f"{community}, {name}: {one.said['note']}" for name, one in known.items() if "note" in one.said]
    for name in [name for name, one in known.items() if "departs" in one.said]:
        apart = here.differences.pop(name, float("nan"))
        notes.append(f"{community}, {name}: {known[name].said['departs']} (the results differ by {apart:.0e}).")
    row = [community, f"{said['peer']} {said['version']}", *(one.cell() for one in ways.values())]
    sentences = [f"{community}, {way}, {sentence}" for way, one in ways.items() for sentence in one.sentences()]
    return row, notes + sentences


def write_provenance() -> None:
    """PROVENANCE.md beside the files; the day is that of the files."""
    lines = ["# Where these files come from", ""]
    lines += ["Written by the peers themselves in their own environments: `python -m benchmarks.interop.run --write`."]
    lines += ["Weights are random numbers of a seed (18, with the variant's name); no published dictionary is in here."]
    lines += ["", "| folder | package | version | script | date |", "|---|---|---|---|---|"]
    for folder in sorted(path for path in (TESTS / "dictionaries").iterdir() if path.is_dir()):
        known = next(iter(variants(folder.name).values()))
        day = date.fromtimestamp((known.folder.parent / "truth.json").stat().st_mtime).isoformat()
        script = PEERS[folder.name].script if folder.name in PEERS else FROM_CHECKOUTS[folder.name]
        cells = [folder.name, known.said["peer"], known.said["version"], f"benchmarks/interop/{script}", day]
        lines.append("| " + " | ".join(cells) + " |")
    (TESTS / "dictionaries" / "PROVENANCE.md").write_text("\n".join(lines) + "\n")


def main(options: Options) -> None:
    peers = with_checkouts(options.checkouts)
    if unknown := set(options.peers) - set(peers):
        raise SystemExit(f"Cannot run {sorted(unknown)}; there are {', '.join(peers)}.")
    chosen = {name: peer for name, peer in peers.items() if name in (options.peers or peers)}
    if options.write:
        for community, peer in chosen.items():
            write(peer, community)
        write_provenance()
    found = [check(community, peer) for community, peer in chosen.items()]
    columns = ["community", "package", "reads its own", "is read here", "reads what is written here"]
    lines = ["# interop", "", *(__doc__ or "").split("\n\n")[0].splitlines(), ""]
    lines += [
        "Each cell: how many of the variants agree to 1e-5, and the largest difference relative to the largest number.",
        "",
    ]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row, _ in found]
    refused = [f"* {sentence}" for _, sentences in found for sentence in sentences]
    lines += ["", "Peculiar, or refused:", "", *refused] if refused else []
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
