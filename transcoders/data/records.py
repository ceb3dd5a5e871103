"""Documents in a text column of records: JSON lines, parquet, folders and data sets of the hub, read by `datasets`."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from transcoders.data.places import damaged, whole_number
from transcoders.errors import FileFormatError, InputError
from transcoders.hub import first_line, hub_says

logger = logging.getLogger(__name__)


class Where(NamedTuple):
    """What `datasets.load_dataset` is asked for."""

    name: str
    """For messages."""
    path: str
    """A builder, a folder or a hub name."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    files: tuple[str, ...] = ()
    """Files for the builder."""
    column: str = "text"


class Records:
    """The texts of one column, streamed; `InputError` at once for what is not there, naming what is."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self._data = _open(where)
        first = next(iter(_reading(where, lambda: iter(copy.deepcopy(self._data)))), None)
        if first is None:
            raise InputError(f"{where.name} is empty: its split {where.split!r} has no record; give text.")
        if where.column not in first:
            raise InputError(
                f"{where.name} has no column {where.column!r}; it has {_listed(first)}: choose the one that holds the "
                "text with column (--corpus-column)."
            )
        _text(where, first)

    def __call__(self, state: Mapping[str, Any] | None = None) -> "RecordPass":
        """A pass from the first record, or from where another's `state()` says."""
        # A copy in full, for a place in the data is kept in the parts of the data set.
        return RecordPass(self.where, copy.deepcopy(self._data), state)


class RecordPass:
    """One pass over `Records`; a place in them is one of `IterableDataset.state_dict`, and how many records on from it.

    Releases of `datasets` (5.0) stand still in what they say once they have been gone on with
    (https://github.com/huggingface/datasets/issues/8308); then records are counted from the place that was loaded.
    """

    def __init__(self, where: Where, data: Any, state: Mapping[str, Any] | None) -> None:
        self._where, self._data = where, data
        self._n = self._since = 0
        self._loaded: Any = None
        self._after_first: Any = None
        self._records = iter(_reading(where, lambda: iter(data)))
        if state is not None:
            self._go_on(state)

    def __iter__(self) -> "RecordPass":
        return self

    def __next__(self) -> str:
        try:
            record = next(self._records)
        except (KeyError, TypeError, AttributeError) as error:  # a state is looked at only now
            if self._loaded is None:
                raise
            raise damaged("dataset", self._loaded, f"a state of {self._where.name}") from error
        text = _text(self._where, record, self._n + 1)
        self._n, self._since = self._n + 1, self._since + 1
        if self._since == 1 and self._loaded is not None:
            self._after_first = self._data.state_dict()
        return text

    def state(self) -> dict[str, Any]:
        now = self._data.state_dict()
        if self._loaded is not None and (self._since < 2 or now == self._after_first):
            return {"record": self._n, "dataset": self._loaded, "since": self._since}
        return {"record": self._n, "dataset": now, "since": 0}

    def _go_on(self, state: Mapping[str, Any]) -> None:
        since, self._n = whole_number(state, "since"), whole_number(state, "record")
        self._loaded = state.get("dataset")
        if not isinstance(self._loaded, dict):
            raise damaged("dataset", self._loaded, f"a state of {self._where.name}")
        self._data.load_state_dict(copy.deepcopy(self._loaded))
        self._n -= since
        for _ in islice(self, since):
            pass


def _open(where: Where) -> Any:
    """The `IterableDataset`; its split is chosen here, so that the message can name those there are."""
    import datasets

    files = {"train": list(where.files)} if where.files else None
    logger.info("streaming %s", where.name)
    try:
        found: Any = datasets.load_dataset(
            where.path, name=where.config, revision=where.revision, data_files=files, streaming=True
        )
    except StopIteration:  # datasets' JSON builder, of an empty file
        raise InputError(f"{where.name} is empty; give text.") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except ValueError as error:
        raise _no_config(where) or _unreadable(where, error) from error
    except (OSError, RuntimeError, ImportError) as error:
        raise _unreadable(where, error) from error
    if where.split not in found:
        raise InputError(
            f"{where.name} has no split {where.split!r}; it has {_listed(found)}: choose one with split "
            "(--corpus-split)."
        )
    return found[where.split]


def _reading(where: Where, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The records, with what goes wrong on the way as an error of ours."""
    try:
        yield from start()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's errors are among them
        raise _unreadable(where, error) from error


def _text(where: Where, record: Mapping[str, Any], number: int = 1) -> str:
    text = record[where.column]
    if text is None:  # a document still, so that the others stay where they are
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"The column {where.column!r} of {where.name} holds {text!r:.40} in record {number:,}, which is "
            f"{type(text).__name__}; choose a column of text with column (--corpus-column)."
        )
    return text


def _no_config(where: Where) -> InputError | None:
    """The error of a configuration that is missing or wrong; None where it is neither."""
    import datasets

    if where.files:
        return None
    try:
        names = datasets.get_dataset_config_names(where.path, revision=where.revision)
    except (OSError, ValueError, RuntimeError) as error:
        logger.debug("the configurations of %s are not known: %s", where.name, error)
        return None
    if where.config in names or (where.config is None and len(names) < 2):
        return None
    wrong = f"has no configuration {where.config!r}" if where.config else "has several configurations"
    return InputError(f"{where.name} {wrong}; choose one with config (--corpus-config): {_listed(names)}.")


def _not_utf8(where: Where, error: UnicodeDecodeError) -> FileFormatError:
    return FileFormatError(
        f"{where.name} is not UTF-8: there is the byte 0x{error.object[error.start]:02x}; convert it to UTF-8."
    )


def _unreadable(where: Where, error: Exception) -> InputError:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    said = hub_says(cause) if not where.files else first_line(error)
    instead = "give whole files of JSON lines or parquet" if where.files else "check the name and the network"
    return InputError(f"Could not read {where.name} ({said.rstrip('.')}); {instead}.")


def _listed(names: Any, most: int = 20) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
