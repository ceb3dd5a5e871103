"""What a device would be asked to do: the device's form of the code, run and taken down on the processor.

`device_form` makes the package take its device's form on tensors of the processor; `Tape` takes down every operation,
and which of them would make the host wait for a CUDA device.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from transcoders.kernels import host

_WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "bincount", "argwhere", "multinomial", "histc", "lift_fresh",
}  # fmt: skip
"""Operations of aten whose CUDA form reads from the device, or (`lift_fresh`) writes a number of the host's to it."""
_READING = ("tolist", "numpy", "cpu", "__array__")
"""Methods of a tensor that bring it to the host without an operation of aten that says so."""
_FREE = {
    "detach", "view", "_unsafe_view", "alias", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "unbind", "as_strided", "lift_fresh", "empty", "empty_like", "new_empty",
}  # fmt: skip
"""Operations that launch nothing and move no bytes."""


_OF_THE_HOST = {
    ("host.py", "read"),  # what was copied several steps ago
    ("derivative.py", "_rows"),  # rows of text, before they are sent
    ("outliers.py", "groups_of"),
    ("outliers.py", "late"),
    ("cpu.py", "_hush_beta_warning"),
}  # fmt: skip
"""Modules and functions whose tensors are the host's."""


class Operation(NamedTuple):
    """One operation."""

    name: str
    bytes: int
    """Of what it reads and writes."""


class Tape(TorchDispatchMode):
    """Operations in the order they are asked for, and what would wait, with the line of the package that asked.

    Here all tensors are the processor's; on a GPU those of the functions in `_OF_THE_HOST` are still, and are read as
    they please.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.waits: list[str] = []
        self._methods = _Methods(self.waits)

    def __enter__(self) -> "Tape":
        self._methods.__enter__()
        return super().__enter__()  # pyright: ignore[reportReturnType]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._methods.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        result = func(*args, **kwargs)
        if _waits(name, args, kwargs, result):
            _note(name, self.waits)
        if name not in _FREE:
            self.operations.append(Operation(name, _bytes((args, kwargs)) + _bytes(result)))
        return result

    def launched(self, name: str, arguments: Any) -> None:
        """Take down a kernel of the package's own, with the bytes of its arguments."""
        self.operations.append(Operation(name, _bytes(arguments)))

    @property
    def launches(self) -> int:
        return len(self.operations)

    @property
    def bytes(self) -> int:
        """What all operations read and write."""
        return sum(operation.bytes for operation in self.operations)

    def counts(self) -> Counter[str]:
        """How often each operation was asked for."""
        return Counter(operation.name for operation in self.operations)


class _Methods(TorchFunctionMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING and args and isinstance(args[0], Tensor):
            _note(name, self.waits)
        return func(*args, **(kwargs or {}))


@contextmanager
def device_form() -> Iterator[None]:
    """The package's device form, on the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "queued", lambda x: True)
        yield


@contextmanager
def kernels_on(tape: Tape, modules: list[Any]) -> Iterator[None]:
    """Triton's kernels of some modules, taken down as one launch each; what the interpreter does inside is not."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if hasattr(kernel, "fn"):
                    patch.setattr(module, name, _Taken(tape, name, kernel))
        yield


class _Taken:
    """A kernel whose launches go on a tape."""

    def __init__(self, tape: Tape, name: str, kernel: Any) -> None:
        self.tape, self.name, self.kernel, self.fn = tape, name, kernel, kernel.fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """From within another kernel."""
        return self.kernel(*args, **kwargs)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.tape.launched(self.name, args)
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


def _waits(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    if name in _WAITING:
        return name != "lift_fresh" or result.numel() > 0
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype in (torch.bool, torch.uint8) for x in indices)
    return name == "repeat_interleave" and isinstance(args[0], Tensor) and kwargs.get("output_size") is None


def _bytes(found: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(found) if isinstance(x, Tensor))


def _note(name: str, waits: list[str]) -> None:
    """Put down the innermost line of the package, or of the test."""
    frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename and f.filename != __file__]
    of_package = [f for f in frames if "/transcoders/" in f.filename or "/circuitsae/" in f.filename]
    frame = (of_package or frames)[-1]
    file = frame.filename.rpartition("/")[2]
    if (file, frame.name) not in _OF_THE_HOST:
        waits.append(f"{name} at {file}:{frame.lineno} ({frame.line})")
