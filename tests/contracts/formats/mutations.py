"""Folders of dictionaries with one fault each, and what a loader may do with them: refuse in a sentence, or load sound.

    for fault in mutated(folder, n=300, seed=0):        # files in memory, one fault each
        fault.write(place)
    assert_refused_or_same(load, folder, truth)         # all of them, with the memory that loading takes

A case is a function of its number, so that `mutated(folder, n=1, first=217)` is case 217 alone.
"""

import io
import json
import math
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from transcoders.dictionaries import DictionarySet
from transcoders.errors import CircuitsaeError

Files = dict[str, bytes | None]
"""Contents by path inside of the folder; None for a folder in a file's place."""
Load = Callable[[Path], DictionarySet]

LONGEST_SENTENCE = 600
OVERHEAD = 24 * 2**20
"""Bytes that loading may take beside the files: modules imported on the way, and what the allocator keeps."""
SLOWEST = 5.0
"""Seconds of one processor that a small folder may take."""
_HUGE = 2**31
_JUNK = [
    *(None, True, -1, 0, 3, 2.5, 1e308, 1e999, 10**9, 10**30, -(10**400), math.nan),
    *("", "\ud800", "relu", "7", "NaN", "x" * 5000, "../../etc/passwd", "a\nb"),
    *([], {}, [{}], {"a": [1]}, [[]], [None] * 50, [1, 2]),
]


@dataclass(frozen=True)
class Fault:
    """A folder with one fault."""

    number: int
    what: str
    files: Files

    @property
    def size(self) -> int:
        return sum(len(content) for content in self.files.values() if content is not None)

    def write(self, place: Path) -> Path:
        place.mkdir(parents=True)
        for name, content in self.files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            else:
                path.write_bytes(content)
        return place


def mutated(folder: Path, n: int = 300, seed: int = 0, first: int = 0) -> Iterator[Fault]:
    """`n` faults of a sound folder, from the number `first` on; kinds of faults and of files take turns."""
    sound: Files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    turns = [(suffix, fault) for suffix in _suffixes(sound) for fault in (*_ANY, *_BY_SUFFIX.get(suffix, ()))]
    for number in range(first, first + n):
        rng = random.Random(seed * 1_000_003 + number)
        suffix, fault = turns[number % len(turns)]
        name = rng.choice([name for name in sound if PurePosixPath(name).suffix == suffix])
        files = dict(sound)
        fault(files, name, rng)
        yield Fault(number, f"{name}: {fault.__name__.strip('_')}", files)


def assert_refused_or_same(load: Load, folder: Path, truth: DictionarySet, n: int = 300, seed: int = 0) -> None:
    """Every fault is refused by an error of this package, in one sentence, or loads to sound dictionaries.

    Sound: finite, of the widths of `truth`, and they encode and reconstruct. Where the system tells it (Linux), loading
    takes no more than twice the bytes of the files, and `OVERHEAD`.
    """
    assert (wrong := _unsound(load(folder), truth)) is None, wrong  # and whatever is imported on the way
    problems = _in_a_child(lambda: list(_problems(load, folder, truth, n, seed)))
    assert not problems, f"{len(problems)} of {n} faults are not met:\n" + "\n".join(problems[:20])


# judging


def _problems(load: Load, folder: Path, truth: DictionarySet, n: int, seed: int) -> Iterator[str]:
    kinds = {"refused": 0, "loaded": 0}
    with tempfile.TemporaryDirectory() as places:
        for fault in mutated(folder, n, seed):
            place = fault.write(Path(places) / str(fault.number))
            before, start = _peak(), time.process_time()
            problem = _met(load, place, truth, kinds)
            taken, seconds = _peak() - before, time.process_time() - start
            if taken > 2 * fault.size + OVERHEAD:
                problem = f"took {taken:,} bytes for {fault.size:,}; {problem or ''}"
            if seconds > SLOWEST:
                problem = f"took {seconds:.1f} s; {problem or ''}"
            if problem is not None:
                yield f"case {fault.number} ({fault.what}): {problem}"
            shutil.rmtree(place)
            if (folder_made := Path(_unpickled())).exists():
                folder_made.rmdir()
                yield f"case {fault.number} ({fault.what}): the pickle's code was run"
    if kinds["refused"] < n / 3:  # a harness whose faults are none would find nothing
        yield f"only {kinds['refused']} of {n} faults are refused, {kinds['loaded']} load"


def _met(load: Load, place: Path, truth: DictionarySet, kinds: dict[str, int]) -> str | None:
    """What is wrong with how a fault is met; None where nothing is."""
    try:
        loaded = load(place)
    except CircuitsaeError as error:
        kinds["refused"] += 1
        said = str(error)
        if "\n" in said or not 0 < len(said) <= LONGEST_SENTENCE:
            return f"is refused by no sentence of at most {LONGEST_SENTENCE} characters ({len(said)}): {said[:400]!r}"
        return None
    except BaseException as error:  # the very thing that is looked for
        kinds["refused"] += 1
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} at {at.filename}:{at.lineno}"
    kinds["loaded"] += 1
    try:
        return _unsound(loaded, truth)
    except Exception as error:
        return f"loads, but does not run: {type(error).__name__}: {str(error)[:200]!r}"


@torch.no_grad()
def _unsound(loaded: DictionarySet, truth: DictionarySet) -> str | None:
    widths = {truth.n_features(layer) for layer in range(truth.n_layers)} | {0}
    found = {loaded.n_features(layer) for layer in range(loaded.n_layers)}
    if loaded.d_model != truth.d_model or not found <= widths:
        return f"loads with d_model {loaded.d_model} and widths {sorted(found)}"
    state = loaded.state_dict() if isinstance(loaded, torch.nn.Module) else {}
    if wrong := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        return f"loads with {wrong[0]} not finite"
    dtype = next((tensor.dtype for tensor in state.values()), torch.float32)
    reads = torch.randn(loaded.n_layers, 3, loaded.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = loaded.encode(reads)
    written = loaded.reconstruct(features, reads)
    if not (bool(features.value.isfinite().all()) and bool(written.isfinite().all())):
        return "loads, but what it encodes or reconstructs is not finite"
    return None


def _peak() -> int:
    """The most address space this process had, in bytes: also what was asked for and never touched; 0 if unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmPeak:")[1].split()[0]) * 1024


def _in_a_child(run: Callable[[], list[str]]) -> list[str]:
    """What `run` returns in a forked process, whose peak of memory is its own; here where there is no fork."""
    if sys.platform != "linux":
        return run()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the hub's client, which wait
        child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            said = run()
        except BaseException:
            said = [traceback.format_exc()]
        with os.fdopen(writing, "w", encoding="utf-8", errors="backslashreplace") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else [f"the process ended with status {status}"]


# faults of any file


def _suffixes(sound: Mapping[str, Any]) -> list[str]:
    return sorted({PurePosixPath(name).suffix for name in sound})


def _truncated(files: Files, name: str, rng: random.Random) -> None:
    files[name] = (content := _bytes(files, name))[: rng.randrange(len(content))]


def _flipped_at_the_start(files: Files, name: str, rng: random.Random) -> None:
    content = bytearray(_bytes(files, name))
    content[rng.randrange(min(len(content), 400))] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)


def _flipped_anywhere(files: Files, name: str, rng: random.Random) -> None:
    content = bytearray(_bytes(files, name))
    at = rng.randrange(len(content))
    content[at : at + 8] = rng.randbytes(len(content[at : at + 8]))
    files[name] = bytes(content)


def _missing(files: Files, name: str, rng: random.Random) -> None:
    del files[name]


def _empty(files: Files, name: str, rng: random.Random) -> None:
    files[name] = b""


def _other_content(files: Files, name: str, rng: random.Random) -> None:
    content = _bytes(files, name)
    files[name] = rng.choice(
        [b"[" * 100_000, b"{}", b"null", b"\x00" * 9, b"\xff" * 64, content * 2, b'{"a":' * 50_000, b"PK\x03\x04"]
    )


def _content_of_another(files: Files, name: str, rng: random.Random) -> None:
    files[name] = files[rng.choice(list(files))]


def _folder_in_its_place(files: Files, name: str, rng: random.Random) -> None:
    files[name] = None


def _another_name(files: Files, name: str, rng: random.Random) -> None:
    content, digits = files.pop(name), [i for i, letter in enumerate(name) if letter.isdigit()]
    at = rng.choice(digits) if digits else 0
    files[name[:at] + rng.choice(["9", "99999", "10000000", "x", "١"]) + name[at + 1 :]] = content


_ANY = (
    _truncated, _flipped_at_the_start, _flipped_anywhere, _missing, _empty, _other_content, _content_of_another,
    _folder_in_its_place, _another_name,
)  # fmt: skip


def _bytes(files: Files, name: str) -> bytes:
    content = files[name]
    assert content is not None
    return content


# faults of settings


def _place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """Something in the settings, at any depth: its container and its key."""
    at, keys = document, list(document) if isinstance(document, dict) else list(range(len(document)))
    key = rng.choice(keys)
    while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
        at = at[key]
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
    return at, key


def _settings_fault(change: Callable[[Any, Any, random.Random], None]) -> Callable[[Files, str, random.Random], None]:
    def fault(files: Files, name: str, rng: random.Random) -> None:
        import yaml

        text, is_json = _bytes(files, name).decode(), name.endswith(".json")
        document = json.loads(text) if is_json else yaml.safe_load(text)
        change(*_place(document, rng), rng)
        written = json.dumps(document) if is_json else yaml.safe_dump(document)
        files[name] = written.encode(errors="surrogatepass")

    fault.__name__ = change.__name__
    return fault


def _setting_missing(at: Any, key: Any, rng: random.Random) -> None:
    del at[key]


def _setting_of_another_type(at: Any, key: Any, rng: random.Random) -> None:
    at[key] = rng.choice(_JUNK)


def _setting_a_little_off(at: Any, key: Any, rng: random.Random) -> None:
    old = at[key]
    if isinstance(old, bool):
        at[key] = not old
    elif isinstance(old, int | float):
        at[key] = rng.choice([old + 1, old - 1, -old, old * 10**6, float(old), str(old)])
    else:
        at[key] = rng.choice([str(old) + "x", str(old)[:-1], [old], {"value": old}])


_SETTINGS = tuple(map(_settings_fault, (_setting_missing, _setting_of_another_type, _setting_a_little_off) * 2))

# faults of tensors, in whatever container


def _short(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return old[..., :-1].contiguous() if old.ndim else old.reshape(1)


def _flat(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return old.reshape(-1)


def _deeper(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return old.unsqueeze(rng.choice([0, -1]))


def _transposed(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return old.T.contiguous() if old.ndim == 2 and len(set(old.shape)) == 2 else old.reshape(1, -1)


def _none(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return old.reshape(-1)[:0]


def _of_another_dtype(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return old.to(rng.choice([torch.int64, torch.bool, torch.uint8, torch.float64, torch.float16]))


def _not_finite(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    values = old.double().reshape(-1).clone()
    values[rng.randrange(len(values))] = rng.choice([math.nan, math.inf, -math.inf])
    return values.reshape(old.shape).to(old.dtype if old.is_floating_point() else torch.float64)


def _absurd(old: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if old.is_floating_point():
        return torch.full_like(old, rng.choice([3e38 if old.dtype != torch.float16 else 6e4, 1e4, -1e4, 0.0]))
    return torch.full_like(old, rng.choice([0, -1, 127]))


_TENSORS = (_short, _flat, _deeper, _transposed, _none, _of_another_dtype, _not_finite, _absurd)


@dataclass(frozen=True)
class _Container:
    """How one suffix holds tensors: `read` gives them by name, `write` the bytes of them."""

    read: Callable[[bytes], dict[str, torch.Tensor]]
    write: Callable[[dict[str, torch.Tensor], bytes], bytes]

    def faults(self) -> tuple[Callable[[Files, str, random.Random], None], ...]:
        return (*(self._of_a_tensor(change) for change in _TENSORS), self._tensor_missing, self._tensor_renamed)

    def _of_a_tensor(
        self, change: Callable[[torch.Tensor, random.Random], torch.Tensor]
    ) -> Callable[[Files, str, random.Random], None]:
        def fault(files: Files, name: str, rng: random.Random) -> None:
            tensors = self.read(content := _bytes(files, name))
            key = rng.choice(sorted(tensors))
            tensors[key] = change(tensors[key], rng)
            files[name] = self.write(tensors, content)

        fault.__name__ = f"tensor{change.__name__}"
        return fault

    def _tensor_missing(self, files: Files, name: str, rng: random.Random) -> None:
        tensors = self.read(content := _bytes(files, name))
        del tensors[rng.choice(sorted(tensors))]
        files[name] = self.write(tensors, content)

    def _tensor_renamed(self, files: Files, name: str, rng: random.Random) -> None:
        tensors = self.read(content := _bytes(files, name))
        key = rng.choice(sorted(tensors))
        tensors[rng.choice([key + "_", "x\ny", "", "é" * 300])] = tensors.pop(key)
        files[name] = self.write(tensors, content)


def _read_safetensors(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def _write_safetensors(tensors: dict[str, torch.Tensor], before: bytes) -> bytes:
    """With the metadata of before but its checksums, which would notice every fault alike."""
    from safetensors.torch import save

    metadata = {key: value for key, value in _header(before).get("__metadata__", {}).items() if key != "checksums"}
    return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, metadata or None)


def _read_npz(content: bytes) -> dict[str, torch.Tensor]:
    import numpy as np

    with np.load(io.BytesIO(content)) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def _write_npz(tensors: dict[str, torch.Tensor], before: bytes) -> bytes:
    import numpy as np

    arrays: Any = {name.replace("\n", " "): tensor.numpy() for name, tensor in tensors.items()}
    np.savez(held := io.BytesIO(), **arrays)
    return held.getvalue()


def _read_torch(content: bytes) -> dict[str, torch.Tensor]:
    return {
        f"{outer}\0{inner}" if inner else outer: tensor
        for outer, value in torch.load(io.BytesIO(content), weights_only=True).items()
        for inner, tensor in (value.items() if isinstance(value, dict) else [("", value)])
        if isinstance(tensor, torch.Tensor)
    }


def _write_torch(tensors: dict[str, torch.Tensor], before: bytes) -> bytes:
    held: dict[str, Any] = {
        name: value
        for name, value in torch.load(io.BytesIO(before), weights_only=True).items()
        if not isinstance(value, dict | torch.Tensor)
    }
    for name, tensor in tensors.items():
        outer, _, inner = name.partition("\0")
        if inner:
            held.setdefault(outer, {})[inner] = tensor
        else:
            held[outer] = tensor
    torch.save(held, into := io.BytesIO())
    return into.getvalue()


# faults of one container's own


def _header(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def _with_header(content: bytes, header: str) -> bytes:
    encoded = header.encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + struct.unpack("<Q", content[:8])[0] :]


@contextmanager
def _edited_header(files: Files, name: str) -> Iterator[dict[str, Any]]:
    header = _header(content := _bytes(files, name))
    yield header
    files[name] = _with_header(content, json.dumps(header))


def _entry(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return header[rng.choice(sorted(header.keys() - {"__metadata__"}))]


def _header_shape_huge(files: Files, name: str, rng: random.Random) -> None:
    with _edited_header(files, name) as header:
        entry = _entry(header, rng)
        entry["shape"] = rng.choice([[_HUGE], [_HUGE, 8], [2**62, 2**62], [0, _HUGE], [-1], [_HUGE] * 40, [1.5], "8"])


def _header_offsets_huge(files: Files, name: str, rng: random.Random) -> None:
    with _edited_header(files, name) as header:
        entry = _entry(header, rng)
        entry["shape"] = [_HUGE, 8]
        entry["data_offsets"] = [0, _HUGE * 32]


def _header_offsets_overlap(files: Files, name: str, rng: random.Random) -> None:
    with _edited_header(files, name) as header:
        _entry(header, rng)["data_offsets"] = _entry(header, rng)["data_offsets"]


def _header_dtype(files: Files, name: str, rng: random.Random) -> None:
    with _edited_header(files, name) as header:
        _entry(header, rng)["dtype"] = rng.choice(["I32", "U32", "BOOL", "F64", "C64", "F8_E4M3", "X", 3, None])


def _header_twice(files: Files, name: str, rng: random.Random) -> None:
    header = _header(content := _bytes(files, name))
    key = rng.choice(sorted(header.keys() - {"__metadata__"}))
    twice = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(_entry(header, rng))}}}"
    files[name] = _with_header(content, twice)


def _header_deep(files: Files, name: str, rng: random.Random) -> None:
    files[name] = _with_header(_bytes(files, name), rng.choice(["[" * 50_000, '{"a":' * 50_000, "{}", "[]", ""]))


def _header_length(files: Files, name: str, rng: random.Random) -> None:
    length = rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
    files[name] = struct.pack("<Q", length) + _bytes(files, name)[8:]


def _metadata(files: Files, name: str, rng: random.Random) -> None:
    with _edited_header(files, name) as header:
        junk = rng.choice(["[" * 5000, "{}", "[1]", "null", '{"x": 1}', "\x00"])
        header["__metadata__"] = rng.choice([{"checksums": junk}, {"format": junk, "id": junk}, junk, {"a": 1}])


def _npz_bomb(files: Files, name: str, rng: random.Random) -> None:
    """A member of zeros that unpacks to more than there may be."""
    held = io.BytesIO(_bytes(files, name))
    with zipfile.ZipFile(held) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    key = rng.choice(list(members))
    shape = rng.choice(["(10485760,)", "(655360, 16)"])
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    zeros = _zeros_member(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode(), 10 * 2**22)
    files[name] = _zipped({**members, key: zeros}, zipfile.ZIP_DEFLATED)


def _zeros_member(head: bytes, length: int) -> bytes:
    return head + bytes(length)


def _npy_header(files: Files, name: str, rng: random.Random) -> None:
    """A header that claims another shape, or an array of Python's objects."""
    with zipfile.ZipFile(io.BytesIO(_bytes(files, name))) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    key = rng.choice(list(members))
    descr = rng.choice(["<f4", "<f8", "|O", "<U9", "<c8", ">f4", "[('a', '<f4')]"])
    shape = rng.choice(["(2147483648,)", "(-1,)", "()", "(2147483648, 2147483648)", "(3, 'x')", "(((((1,),),),),)"])
    head = f"{{'descr': {descr!r}, 'fortran_order': {rng.choice(['True', 'False', '2'])}, 'shape': {shape}, }}".encode()
    old = members[key]
    body = old[10 + struct.unpack("<H", old[8:10])[0] :]
    members[key] = old[:8] + struct.pack("<H", len(head) + 1) + head + b"\n" + body
    files[name] = _zipped(members)


def _zip_member(files: Files, name: str, rng: random.Random) -> None:
    """A member of the archive is cut off, doubled, or packed."""
    with zipfile.ZipFile(io.BytesIO(_bytes(files, name))) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    key = rng.choice(list(members))
    members[key] = rng.choice([members[key][: len(members[key]) // 2], members[key] * 2, b"", b"\x80\x04N."])
    files[name] = _zipped(members, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def _zipped(members: Mapping[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", how, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def _torch_view(files: Files, name: str, rng: random.Random) -> None:
    """A view of one number that claims to be gigabytes."""
    tensors = _read_torch(content := _bytes(files, name))
    key = rng.choice(sorted(tensors))
    shape = rng.choice([(_HUGE,), (2**16, 2**16), (2**10, 8, 2**20)])
    tensors[key] = torch.ones(1).expand(shape)
    files[name] = _write_torch(tensors, content)


class _Code:
    """Unpickling it would run something."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (_unpickled(),)


def _unpickled() -> str:
    """The folder that appears where a pickle's code is run."""
    return f"{tempfile.gettempdir()}/unpickled-{os.getpid()}"


def _torch_code(files: Files, name: str, rng: random.Random) -> None:
    """A pickle that would run code."""
    torch.save({"state_dict": _Code()}, out := io.BytesIO())
    files[name] = out.getvalue()


def _torch_other(files: Files, name: str, rng: random.Random) -> None:
    """Something else than named tensors."""
    content = rng.choice(
        [[], 7, {}, {"a": {"b": 1}}, torch.zeros(3), {1: torch.zeros(2)}, [torch.zeros(2)], {"a": None}]
    )
    torch.save(content, out := io.BytesIO())
    files[name] = out.getvalue()


_TORCH = (*_Container(_read_torch, _write_torch).faults(), _torch_view, _torch_code, _torch_other, _zip_member)
_BY_SUFFIX: dict[str, tuple[Callable[[Files, str, random.Random], None], ...]] = {
    ".json": _SETTINGS,
    ".yaml": _SETTINGS,
    ".yml": _SETTINGS,
    ".safetensors": (
        *_Container(_read_safetensors, _write_safetensors).faults(),
        *(_header_shape_huge, _header_offsets_huge, _header_offsets_overlap, _header_dtype, _header_twice),
        *(_header_deep, _header_length, _metadata),
    ),
    ".npz": (*_Container(_read_npz, _write_npz).faults(), _npz_bomb, _npy_header, _zip_member),
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".bin": _TORCH,
    ".ckpt": _TORCH,
}
