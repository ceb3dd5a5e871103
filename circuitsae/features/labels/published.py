"""Labels that others published, as a ledger that says who they are from and how well they are said to do.

| file                                    | what is read of it                                                        |
|-----------------------------------------|---------------------------------------------------------------------------|
| Neuronpedia's exports and answers       | records with `layer` (`6-res-jb`), `index`, `description`, or a feature's |
| (.json, .jsonl, either as .gz)          | `explanations`; `explanationModelName`, and their `scores`                |
| circuit-tracer's feature files          | `label` or `clerp`; the name of the file, or `index`, is Cantor's pairing |
| (.json with `examples_quantiles`)       | of layer and feature, unless `layer` is given too                         |
| graphs (.json with `nodes` and `links`) | the labels of feature nodes                                               |

Scores are what the file states. They were not measured here, so the rows `detection` and `fuzzing` stay open.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from circuitsae.features.labels.describing import plain_label
from circuitsae.features.ledger import Evidence, Label, Ledger, RowKind, Verdict
from circuitsae.graph import NodeKind
from circuitsae.graph.checking import Limits, MalformedError, mapping, number, read_bytes, sequence, shown, text, whole
from circuitsae.graph.exchange import read_graph
from transcoders.errors import FileFormatError, InputError

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_EXPECTED = (
    "expected Neuronpedia's explanations (layer, index, description), feature files of circuit-tracer "
    "(examples_quantiles) or the JSON of a graph"
)
_MOST = 2**30
"""Bytes of a file, unpacked."""
_NEURONPEDIA, _CIRCUIT_TRACER = "Neuronpedia", "circuit-tracer"


class Published(NamedTuple):
    """One label as a file has it."""

    layer: int
    feature: int
    text: str
    source: str
    of: str = ""
    """The name of the dictionaries, such as `res-jb`."""
    scores: tuple[tuple[RowKind, str, str, float], ...] = ()
    """Row, what the score is called there, its judge, its value."""

    @property
    def best(self) -> float:
        return max((value for *_, value in self.scores), default=-1.0)


def read_labels(path: str | Path, *, source: str | None = None, of: str | None = None) -> Ledger:
    """The labels of a file, or of all such files in a folder; of several for a feature the one of the best score.

    `source` takes the place of what the file says of who made them; `of`: of an export of several dictionaries only
    those of this name (`res-jb`, or with its layer `6-res-jb`). Labels are cut to one short line of readable text.
    Raises `FileFormatError` for other files, and `InputError` where it has to be said which dictionaries are meant.
    """
    path, best = Path(path), {}
    found = [one for file in _files(path) for one in _labels(file) if of is None or _is_of(one, of)]
    names = sorted({one.of for one in found})
    if not found:
        raise FileFormatError(f"{path} holds no label{'' if of is None else f' of {of!r}'}; {_EXPECTED}.")
    if len(names) > 1:
        raise InputError(f"{path} has labels of several dictionaries, {', '.join(names[:5])}; name one with --set.")
    for one in found:
        held = best.get((one.layer, one.feature))
        if held is None or one.best > held.best:
            best[one.layer, one.feature] = one
    labels = [_label(one, source, path) for _, one in sorted(best.items())]
    return Ledger(labels, {"published": names[0]} if names[0] else {})


def add_labels(found: Ledger, ledger: Ledger) -> Ledger:
    """The second with the labels of the first, which take the place of those of the same source and features."""
    taken = {(label.source, label.features) for label in found.labels}
    kept = [label for label in ledger.labels if (label.source, label.features) not in taken]
    return Ledger([*kept, *found.labels], {**ledger.provenance, **found.provenance})


def _label(one: Published, source: str | None, path: Path) -> Label:
    rows: dict[RowKind, Evidence] = {}
    for kind, called, judge, value in one.scores:
        stated = {"stated": value, "as": called, "judge": judge, "file": path.name}
        rows.setdefault(kind, Evidence(kind, Verdict.OPEN, stated, f"circuitsae features import-labels {path.name}"))
    return Label(one.text, (f"{one.layer}.{one.feature}",), rows, source or one.source)


def _is_of(one: Published, of: str) -> bool:
    return of in (one.of, f"{one.layer}-{one.of}")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES) and file.is_file())
    if not found:
        raise FileFormatError(f"{path} holds no .json or .jsonl file; {_EXPECTED}.")
    return found


def _labels(file: Path) -> list[Published]:
    try:
        content = _content(file)
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            records: Any = _lines(content)
        else:
            document = _document(content)
            if isinstance(document, dict) and {"nodes", "links"} <= document.keys():
                return list(_of_graph(file))
            records = document if isinstance(document, list) else [document]
        return [one for n, record in enumerate(records, 1) for one in _of_record(record, f"record {n}", file)]
    except MalformedError as error:
        raise FileFormatError(f"{file} holds no labels that can be read ({error}); {_EXPECTED}.") from error


def _content(file: Path) -> bytes:
    content = read_bytes(file, Limits(file_bytes=_MOST))
    if not file.name.endswith(".gz"):
        return content
    try:
        with gzip.open(file) as packed:
            content = packed.read(_MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise MalformedError(f"it cannot be unpacked: {error}") from error
    if len(content) > _MOST:
        raise MalformedError(f"it unpacks to more than {_MOST:,} bytes")
    return content


def _lines(content: bytes) -> Iterator[Any]:
    return (_document(line) for line in content.split(b"\n") if line.strip())


def _document(content: bytes) -> Any:
    Limits().check("values", sum(map(content.count, (b",", b"{", b"["))))
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise MalformedError("it is not JSON in UTF-8") from error


def _of_record(record: Any, what: str, file: Path) -> Iterator[Published]:
    """The labels of one record, whichever of the forms it has."""
    fields = mapping(record, what)
    if "examples_quantiles" in fields:
        yield from _of_feature_file(fields, file)
    elif "explanations" in fields:
        for explanation in sequence(fields["explanations"], f"explanations of {what}"):
            own = {name: fields[name] for name in ("layer", "index") if name in fields}
            yield from _of_explanation(own | mapping(explanation, f"an explanation of {what}"), what)
    elif "description" in fields:
        yield from _of_explanation(fields, what)
    else:
        raise MalformedError(f"{what} has neither description, explanations nor examples_quantiles")


def _of_explanation(fields: dict[str, Any], what: str) -> Iterator[Published]:
    where = text(fields.get("layer"), f"layer of {what}")
    split = re.fullmatch(r"(\d{1,6})(?:-(.*))?", where, re.DOTALL)
    if split is None:
        raise MalformedError(f"layer of {what} is {shown(where)}; expected one such as 6-res-jb")
    index = whole(fields.get("index"), f"index of {what}")
    said = plain_label(text(fields.get("description") or "", f"description of {what}"))
    if said is not None:
        model = plain_label(text(fields.get("explanationModelName") or "", f"explanationModelName of {what}"))
        source = _NEURONPEDIA if model is None else f"{model} ({_NEURONPEDIA})"
        scores = tuple(_scores(sequence(fields.get("scores") or [], f"scores of {what}"), what))
        yield Published(int(split[1]), index, said, source, split[2] or "", scores)


def _scores(found: list[Any], what: str) -> Iterator[tuple[RowKind, str, str, float]]:
    """Those of the two tests that the ledger has: its `detection` is called recall there too."""
    for each in found:
        fields = mapping(each, f"a score of {what}")
        called = text(fields.get("explanationScoreTypeName") or "", f"explanationScoreTypeName of {what}")
        value = number(fields.get("value"), f"a score of {what}")
        judge = plain_label(text(fields.get("explanationScoreModelName") or "", f"the judge of {what}")) or ""
        kind: RowKind | None = (
            "fuzzing" if "fuzz" in called else "detection" if re.search("detection|recall", called) else None
        )
        if kind is not None and math.isfinite(value):
            yield kind, called, judge, value


def _of_feature_file(fields: dict[str, Any], file: Path) -> Iterator[Published]:
    said = plain_label(text(fields.get("label") or fields.get("clerp") or "", "the label"))
    if said is None:
        return
    named = re.fullmatch(r"(\d{1,18})\.json(?:\.gz)?", file.name)
    index = whole(named[1] if fields.get("index") is None and named else fields.get("index"), "index")
    stated = fields.get("layer")
    layer, feature = unpaired(index) if stated is None else (whole(stated, "layer", most=10**6), index)
    yield Published(layer, feature, said, _CIRCUIT_TRACER)


def unpaired(number: int) -> tuple[int, int]:
    """Layer and feature of Cantor's pairing `(l + f)(l + f + 1)/2 + f`."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def _of_graph(file: Path) -> Iterator[Published]:
    graph = read_graph(file)
    for node in graph.nodes:
        if node.kind is NodeKind.FEATURE and (said := plain_label(node.text)) is not None:
            yield Published(node.layer, node.index, said, _CIRCUIT_TRACER)
