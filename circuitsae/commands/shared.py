"""What the commands have in common: loading what they are given, where they print, how numbers are written."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import tyro
from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from transcoders.errors import CircuitsaeError, InputError
from transcoders.files import claimed, lasting

if TYPE_CHECKING:
    import pandas as pd

    from circuitsae.features.cards import FeatureCards
    from circuitsae.features.ledger import Ledger
    from circuitsae.graph import AttributionGraph
    from circuitsae.replacement import ReplacementModel
    from transcoders.data import Corpus
    from transcoders.devices import Work
    from transcoders.language_model import LanguageModel

logger = logging.getLogger(__name__)

T = TypeVar("T")
Dtype = Literal["float32", "float64", "bfloat16"]
_DTYPES = ("float32", "float64", "bfloat16", "float16")
Bos = Annotated[bool | None, tyro.conf.DisallowNone]
"""--bos or --no-bos; None where neither is given."""
Wide = Annotated[bool, tyro.conf.arg(help="Keep every column of the tables, however narrow the terminal is.")]


@dataclass(frozen=True)
class Weights:
    """Which weights of the model are loaded, and where to."""

    revision: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of a model of the hub: a branch, a tag or a commit."""
    adapter: Annotated[str | None, tyro.conf.DisallowNone] = None
    """A folder or hub name of peft's, merged into the model."""
    device_map: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Spread the model over devices: auto, balanced or sequential, instead of --device."""
    trust_remote_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the Python code that the model's repository brings, which you have read."""

    def stated(self) -> dict[str, str]:
        """What a graph keeps of it; never whether code may be run."""
        named = {"revision": self.revision, "adapter": None if self.adapter is None else lasting(self.adapter)}
        return {key: value for key, value in named.items() if value is not None}

    def words(self) -> list[str]:
        """As on the command line."""
        values = {"--revision": self.revision, "--adapter": self.adapter, "--device-map": self.device_map}
        given = [word for option, value in values.items() if value is not None for word in (option, value)]
        return given + ["--trust-remote-code"] * self.trust_remote_code


@dataclass(frozen=True)
class Choices:
    """Which of the dictionaries that a folder or repository offers is meant."""

    sae_id: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of the dictionaries: their folder or file, or what SAELens calls them in a release."""
    layers: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of the dictionaries: layers, such as 12 or 0-5,8."""
    site: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of the dictionaries: what they read, such as resid_post."""
    width: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of the dictionaries: features of a layer, 16384 or 16k."""
    l0: Annotated[float | None, tyro.conf.DisallowNone] = None
    """Of the dictionaries: active features of a token; the nearest is taken."""
    variant: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of the dictionaries: what else tells them apart, as `dictionaries list` prints it."""

    @classmethod
    def of_source(cls, source: "Source") -> "Choices":
        """Those that a graph names; `InputError` where a stranger wrote what makes no sense."""
        try:
            return cls(**source.choices, l0=None if source.l0 is None else float(source.l0))
        except ValueError as error:
            raise InputError(f"The graph names the L0 {source.l0!a:.40}; trace the prompt again.") from error

    def wanted(self) -> dict[str, Any]:
        """As `load_dictionaries` takes them."""
        layers = None if self.layers is None else layers_of(self.layers)
        return {
            "sae_id": self.sae_id, "layers": layers, "site": self.site, "width": self.width, "l0": self.l0,
            "variant": self.variant,
        }  # fmt: skip

    def stated(self) -> dict[str, str]:
        """What a graph keeps of it."""
        values = vars(self) | ({} if self.l0 is None else {"l0": f"{self.l0:g}"})
        return {name: str(value) for name, value in values.items() if value is not None}

    def words(self) -> list[str]:
        """As on the command line."""
        return [word for name, value in self.stated().items() for word in (f"--{name.replace('_', '-')}", value)]


def layers_of(text: str) -> list[int]:
    """The layers that "12" or "0-5,8" names."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,5})(?:\s*[-–]\s*(\d{1,5}))?\s*", part)
        if ends is None or int(ends[1]) > int(ends[2] or ends[1]):
            raise InputError(f"--layers {text!r} names no layers; write them like 12 or 0-5,8.")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found


@dataclass(frozen=True)
class CorpusPart:
    """Which part of a corpus is meant."""

    corpus_config: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of a data set: its configuration, such as en."""
    corpus_split: str = "train"
    """Of a data set: its split."""
    corpus_revision: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Of a data set of the hub: a branch, a tag or a commit."""
    corpus_column: str = "text"
    """Of JSON lines, parquet or a data set: the column that holds the text."""

    def wanted(self) -> dict[str, Any]:
        """As `open_corpus` takes it."""
        return {name.removeprefix("corpus_"): value for name, value in vars(self).items()}

    def stated(self) -> dict[str, str]:
        """What was chosen."""
        return {name: value for name, value in vars(self).items() if value != getattr(CorpusPart, name)}


ChoiceOptions = Annotated[Choices, tyro.conf.arg(name=""), tyro.conf.DisallowNone]
NO_CHOICE = Choices()
CorpusPartOptions = Annotated[CorpusPart, tyro.conf.arg(name="")]
THE_WHOLE = CorpusPart()
WeightOptions = Annotated[Weights, tyro.conf.arg(name=""), tyro.conf.DisallowNone]
DEFAULT_WEIGHTS = Weights()


def load_language_model(
    name: str, device: str, dtype: str = "float32", weights: Weights = DEFAULT_WEIGHTS
) -> "LanguageModel":
    """A model by its name on the command line."""
    from transcoders.hub import model_source

    if name != "pocket":
        model_source(name, weights.revision)  # a wrong name is refused before torch takes its seconds
    from circuitsae.loading import load_model

    return load_model(
        name, device=device, dtype=dtype, revision=weights.revision, trust_remote_code=weights.trust_remote_code,
        device_map=weights.device_map, adapter=weights.adapter,
    )  # fmt: skip


def device_for(name: str, device: str, weights: Weights = DEFAULT_WEIGHTS, *, work: "Work" = "training") -> str:
    """The device of a model and what goes with it, of `work`, for what is loaded before the model."""
    if device != "auto" or weights.device_map is not None:
        return device
    from circuitsae.loading import POCKET
    from circuitsae.pocket import MODEL_DIR
    from transcoders.loading import device_for as chosen

    return str(chosen(MODEL_DIR if name == POCKET else name, device, revision=weights.revision, work=work))


def load_replacement(
    model: str,
    dictionaries: str | None,
    device: str,
    dtype: str,
    bos: bool | None = None,
    weights: Weights = DEFAULT_WEIGHTS,
    choices: Choices = NO_CHOICE,
) -> "ReplacementModel":
    """A model with its dictionaries; the pocket model has its own."""
    from circuitsae.loading import dictionaries_for, load_dictionaries
    from circuitsae.replacement import ReplacementModel

    with Console(stderr=True).status("loading"):
        language_model = load_language_model(model, device, dtype, weights)
        name = dictionaries_for(model, dictionaries)
        loaded = load_dictionaries(name, device=language_model.device, **choices.wanted())
        return ReplacementModel(language_model, loaded, bos=bos)


def loader_for(
    graph: "AttributionGraph",
    model: str | None,
    dictionaries: str | None,
    device: str,
    weights: Weights = DEFAULT_WEIGHTS,
    choices: Choices = NO_CHOICE,
) -> Callable[[], "ReplacementModel"]:
    """What loads the model and dictionaries that a graph names, or those that are given in their place."""
    source, dtype, bos = source_of(graph), dtype_of(graph), begins_with_bos(graph)
    name = model or source.model or str(graph.provenance.get("model") or "pocket")
    if model is None:
        revision, adapter = weights.revision or source.revision, weights.adapter or source.adapter
        weights = replace(weights, revision=revision, adapter=adapter)
    if dictionaries is None and choices == NO_CHOICE:
        choices = Choices.of_source(source)
    own = dictionaries or source.dictionaries
    return lambda: load_replacement(name, own, device, dtype, bos, weights, choices)


def dtype_of(graph: "AttributionGraph") -> str:
    """The precision that a graph was traced in."""
    dtype = graph.provenance.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise InputError(
            f"The graph names the precision {ascii(dtype)[:40]}; expected {', '.join(_DTYPES)}; trace the prompt again."
        )
    return str(dtype)


def corpus_for(model: str, corpus: str | None, own: "Corpus", part: CorpusPart = THE_WHOLE) -> "Corpus":
    """The text that was named, or, of the pocket model, its `own`; raises `InputError` where there is none."""
    from circuitsae.loading import POCKET

    if corpus is None and model != POCKET:
        raise InputError(f"No corpus was named for {model}; give --corpus, a text file or the name of a data set.")
    return opened_corpus(corpus, part) or own


def opened_corpus(corpus: str | None, part: CorpusPart) -> "Corpus | None":
    """The text that was named, if any; called before a model is loaded, so that a wrong name is refused at once."""
    from transcoders.data import open_corpus

    if corpus is not None:
        return open_corpus(corpus, **part.wanted())
    if part != THE_WHOLE:
        raise InputError("--corpus-config, -split, -revision and -column choose of a text; give --corpus as well.")
    return None


def write_page(
    graph: "AttributionGraph",
    path: Path,
    *,
    validation: "pd.DataFrame | None" = None,
    folder: Path | None = None,
    edited: bool = True,
) -> Path:
    """The page of a graph, with suggested supernodes, and the feature cards and labels beside its dictionaries.

    `folder`: where the graph is, by default beside the page; where it was `edited`, with the labels, pins, groups and
    notes that were kept there.
    """
    from circuitsae.report import write_html
    from circuitsae.serving.edits import opened_in, own_labels, with_own

    parts, place = page_parts(graph), folder or path.parent
    if edited:
        parts["ledger"] = with_own(_load(lambda: own_labels(place)), parts["ledger"])
        parts["opened"] = _load(lambda: opened_in(place, graph.ids.tolist()))
    return write_html(graph, path, validation=validation, folder=place, **parts)


def page_parts(graph: "AttributionGraph") -> dict[str, Any]:
    """Cards, labels and suggested groups of a graph, as its page takes them."""
    from circuitsae.graph import suggest_supernodes

    cards, ledger = beside_dictionaries(graph)
    return {"cards": cards, "ledger": ledger, "supernodes": suggest_supernodes(graph, cards=cards)}


class Source(NamedTuple):
    """The model and the dictionaries that a graph names, as `trace` was given them; None where it names none."""

    model: str | None
    dictionaries: str | None
    revision: str | None = None
    adapter: str | None = None
    sae_id: str | None = None
    layers: str | None = None
    site: str | None = None
    width: str | None = None
    l0: str | None = None
    variant: str | None = None

    @property
    def choices(self) -> dict[str, str | None]:
        """Which of the dictionaries, but for the L0, which is a number."""
        return {name: getattr(self, name) for name in ("sae_id", "layers", "site", "width", "variant")}


def source_of(graph: "AttributionGraph") -> Source:
    """What a graph was traced with, which a stranger may have written: whatever is no text counts as missing."""
    stated = graph.provenance.get("source")
    fields = stated if isinstance(stated, Mapping) else {}
    return Source(*(value if isinstance(value := fields.get(name), str) and value else None for name in Source._fields))


def begins_with_bos(graph: "AttributionGraph") -> bool | None:
    """Whether a graph's prompt begins with BOS, as it says; None where it says nothing that makes sense."""
    stated = graph.provenance.get("bos")
    return stated if isinstance(stated, bool) else None


def beside_dictionaries(graph: "AttributionGraph") -> "tuple[FeatureCards | None, Ledger | None]":
    """The cards, with their labels, and the ledger beside the dictionaries that a graph names.

    None where there are none, or where they cannot be read or are not of the weights that the graph was traced with.
    """
    source = source_of(graph)
    name = source.dictionaries or ("pocket" if source.model == "pocket" else None)
    return (None, None) if name is None else cards_of(name, graph.provenance.get("dictionary_fingerprint"))


def cards_of(dictionaries: str, traced: Any) -> "tuple[FeatureCards | None, Ledger | None]":
    """The cards, with their labels, and the ledger beside dictionaries, whose weights have the fingerprint `traced`."""
    from circuitsae.features.cards import FeatureCards
    from circuitsae.features.ledger import Ledger, ledger_path
    from circuitsae.pocket import dictionary_folder

    folder = dictionary_folder(dictionaries)
    ledger = _load_if(lambda: ledger_path(folder).is_file(), lambda: Ledger.load(folder))
    cards = _load_if(lambda: FeatureCards.beside(folder), lambda: FeatureCards.load(folder, ledger=ledger))
    known = cards.manifest if cards is not None else ledger.provenance if ledger is not None else {}
    if traced is not None and (found := known.get("dictionary", traced)) != traced:
        logger.warning(
            "The page goes without feature cards and labels: the graph was traced with dictionaries %.40s, but %.200s "
            "now holds those of %.40s; trace the prompt again.", traced, folder, found,
        )  # fmt: skip
        return None, None
    return cards, ledger


def _load_if(there: Callable[[], bool], load: Callable[[], T]) -> T | None:
    return _load(lambda: load() if there() else None)


def _load(load: Callable[[], T | None]) -> T | None:
    try:
        return load()
    except (CircuitsaeError, OSError) as error:
        logger.warning("The page goes without: %.500s", error)
        return None


@contextmanager
def free_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """The folder to write a graph to, held meanwhile: itself, or one beside it where it holds, or will, another graph.

    Raises `WriteError` where it cannot be written to.
    """
    beside = (folder.with_name(f"{folder.name}-{n}") for n in count(2))
    for place in chain([folder], beside):
        with claimed(place) as mine:
            if overwrite or (mine and not (place / "graph.json").exists()):
                yield place
                return


def layer_and_number(text: str, otherwise: str) -> tuple[int, int]:
    """A layer and the number of a feature or head in it, written like 2.311; `InputError` with `otherwise`."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\.([0-9]{1,9})\s*", text)
    if found is None:
        raise InputError(otherwise)
    return int(found[1]), int(found[2])


def say(console: Console, *lines: str) -> None:
    """Print lines as they are: nothing in them is markup, and the terminal wraps them."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def told(first: str) -> Iterator[Callable[[str], None]]:
    """Says what a long command is at: on one changing line of a terminal, else on a line each of the error stream."""
    from transcoders.progress import progress_bar

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with progress_bar(*columns, shown=True) as bar:
        task = bar.add_task(first, total=None)

        def tell(text: str) -> None:
            bar.reset(task, description=text)
            if not bar.console.is_terminal:
                say(bar.console, text)

        tell(first)
        yield tell


def say_next(console: Console, command: str) -> None:
    """What one may do after a command."""
    console.print(f"Next:  {command}", style="dim", highlight=False, soft_wrap=True, markup=False)


def counts() -> ConstructorRegistry:
    """Integers may be written 50_000, 50k, 2M or 1G."""
    registry = ConstructorRegistry()
    powers = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

    def parse(words: list[str]) -> int:
        found = re.fullmatch(r"(-?[\d_]+(?:\.\d+)?)([kmg]?)", words[0].strip().lower())
        if found is None:
            raise ValueError(f"{words[0]!r} is not a whole number; write it like 50000, 50k or 2M.")
        return round(float(found[1].replace("_", "")) * powers[found[2]])

    @registry.primitive_rule
    def whole(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(1, "INT", parse, lambda v: isinstance(v, int), lambda v: [str(v)])

    return registry
