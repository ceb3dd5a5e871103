"""The one writer: whole or not at all, one sentence, nothing left behind, whatever happens in between."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from transcoders.errors import WriteError
from transcoders.files import _sweep, new_file, new_files, new_folder, short_hash, write_file, write_json
from transcoders.formats.files import write_tensors

BEFORE = "before"


def _whole_file(place: Path) -> None:
    write_file(place, "after" * 100_000)


def _json(place: Path) -> None:
    write_json(place, {"after": "after" * 100_000})


def _tensors(place: Path) -> None:
    write_tensors(place, {"after": torch.zeros(100_000)})


def _together(place: Path) -> None:
    with new_files(place) as temporary:
        write_file(temporary / "a", "after")
        write_tensors(temporary / "b", {"after": torch.zeros(100_000)})


def _folder(place: Path) -> None:
    with new_folder(place) as temporary:
        write_file(temporary / "a", "after")
        write_tensors(temporary / "b", {"after": torch.zeros(100_000)})


FILES = [_whole_file, _json, _tensors]
WRITERS = [*FILES, _together, _folder]


def _prepare(write, place: Path) -> None:
    """What was there before: a file, or a folder with one."""
    if write in FILES:
        place.write_text(BEFORE)
    else:
        place.mkdir()
        (place / "a").write_text(BEFORE)


def _unchanged(write, place: Path) -> bool:
    (there,) = place.parent.iterdir()
    return there == place and (place if write in FILES else only(place)).read_text() == BEFORE


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@contextmanager
def at_most(n_bytes: int):
    """Files of this process may not grow beyond `n_bytes`: the system refuses in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    earlier = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, earlier)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_that_may_not_grow(tmp_path, write, exists):
    place = tmp_path / "deep" / "place"
    if exists:
        place.parent.mkdir()
        _prepare(write, place)
    with at_most(10_000), pytest.raises(WriteError, match=f"^Cannot write {place}: the file would be larger") as raised:
        write(place)
    assert "\n" not in str(raised.value)
    assert _unchanged(write, place) if exists else not list(tmp_path.iterdir())
    write(place)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk with {} is full; make room"),
        (errno.EDQUOT, "the disk with {} is full; make room"),
        (errno.EROFS, "{} may not be written to"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_system_refuses_when_the_data_reach_the_disk(tmp_path, monkeypatch, write, number, said):
    place = tmp_path / "place"
    _prepare(write, place)

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError) as raised:
        write(place)
    assert str(raised.value).startswith(f"Cannot write {place}: ")
    assert said.format(tmp_path if write in FILES else place) in str(raised.value)
    assert _unchanged(write, place)


def _interrupted(opened, stop: type[BaseException]) -> None:
    with opened as temporary:
        (temporary if temporary.is_file() else temporary / "a").write_text("after")
        raise stop


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interruption_leaves_what_was_there(tmp_path, stop):
    write_file(tmp_path / "file", BEFORE)
    write_file(tmp_path / "together" / "a", BEFORE)
    write_file(tmp_path / "folder" / "a", BEFORE)
    for opened in (new_file(tmp_path / "file"), new_files(tmp_path / "together"), new_folder(tmp_path / "folder")):
        with pytest.raises(stop):
            _interrupted(opened, stop)
    left = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == dict.fromkeys(["file", "together/a", "folder/a"], BEFORE)


def test_files_in_folders_are_moved_together(tmp_path):
    write_file(tmp_path / "place" / "a" / "old", BEFORE)
    write_file(tmp_path / "place" / "b" / "stale", BEFORE)
    with new_files(tmp_path / "place", without=["b/stale"]) as temporary:
        write_file(temporary / "a" / "new", "after")
        write_file(temporary / "c" / "d" / "new", "after")
    left = {path.relative_to(tmp_path / "place").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a/old", "a/new", "c/d/new"}
    write_file(tmp_path / "place" / "e", BEFORE)
    with pytest.raises(WriteError), new_files(tmp_path / "place") as temporary:  # a file has the folder's name
        write_file(temporary / "e" / "new", "after")
    assert (tmp_path / "place" / "e").read_text() == BEFORE


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_where_a_folder_should_be(tmp_path, write):
    (tmp_path / "file").write_text(BEFORE)
    with pytest.raises(WriteError, match=f"{tmp_path / 'file'} is a file, but a folder is needed there"):
        write(tmp_path / "file" / "below" / "place")
    if write not in FILES:
        with pytest.raises(WriteError, match=f"{tmp_path / 'file'} is a file, but a folder is needed there"):
            write(tmp_path / "file")
    assert only(tmp_path).read_text() == BEFORE


@pytest.mark.parametrize("write", FILES)
def test_a_folder_where_the_file_should_be(tmp_path, write):
    (tmp_path / "place").mkdir()
    with pytest.raises(WriteError, match="a folder has that name"):
        write(tmp_path / "place")
    assert not list(only(tmp_path).iterdir())


@pytest.mark.parametrize("write", WRITERS)
def test_a_name_too_long(tmp_path, write):
    with pytest.raises(WriteError, match="its name is too long"):
        write(tmp_path / ("x" * 300))
    assert not list(tmp_path.iterdir())
    write(tmp_path / ("x" * 250))


@pytest.mark.parametrize("write", FILES)
def test_a_link_stays_a_link_and_permissions_are_the_usual_ones(tmp_path, write):
    (tmp_path / "real").write_text(BEFORE)
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() != BEFORE.encode()
    (tmp_path / "usual").touch()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_device_is_written_to_and_stays_one():
    write_file(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()


def test_together_keeps_the_other_files_and_folder_does_not(tmp_path):
    for write in (_together, _folder):
        write_file(tmp_path / "place" / "other", BEFORE)
        write(tmp_path / "place")
        assert sorted(p.name for p in (tmp_path / "place").iterdir()) == (["a", "b"] + ["other"] * (write is _together))


def test_a_kill_leaves_the_earlier_file_and_a_later_writer_sweeps(tmp_path):
    write_file(tmp_path / "file", BEFORE)
    script = (
        "import os, signal, sys; from pathlib import Path; from transcoders.files import write_file\n"
        "write_file(Path(sys.argv[1]), lambda file: (file.write(b'half'), file.flush(), os.kill(os.getpid(), 9)))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "file"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == BEFORE
    (left,) = tmp_path.glob("*.tmp")
    yesterday = time.time() - 2 * 24 * 60 * 60
    os.utime(left, (yesterday, yesterday))
    (tmp_path / ".mine.tmp").touch()
    os.utime(tmp_path / ".mine.tmp", (yesterday, yesterday))
    _sweep.cache_clear()
    write_file(tmp_path / "file", "after")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "file"]


def test_the_hash_is_of_all_parts():
    assert short_hash(["ab", b"c"]) == short_hash(["abc"]) == "ba7816bf8f01cfea"
