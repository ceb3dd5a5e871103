"""Where dictionaries lie: a local folder or file, or a repository of the hub, of which only what is needed is fetched.

FOLDER or FILE                          on this machine
OWNER/NAME[@REVISION][/SUB/FOLDER]      on the hub; hf://… is the same, with ?revision=… or @REVISION at its end too
gemma, llama, with @REVISION            circuit-tracer's short names
RELEASE[@REVISION]                      a release of SAELens', such as gpt2-small-res-jb
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs

from transcoders.errors import FileFormatError
from transcoders.files import settle
from transcoders.formats.releases import Release, near_releases, release_named
from transcoders.hub import downloaded, hub_problem, hub_says

logger = logging.getLogger(__name__)

SHORT_NAMES = {"gemma": "mwhanna/gemma-scope-transcoders", "llama": "mntss/transcoder-Llama-3.2-1B"}
"""circuit-tracer's names for two repositories."""
MOST_FILES = 100_000
_INSTEAD = "check the name and the network, or give a local folder"
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?P<path>(/+[^/@]+)*)/*"
    r"(@(?P<late>[^@]*[^/@])/*)?"
)
"""A revision at the end may have slashes; one before a path may not, but for the hub's own such as `refs/pr/7`."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine, or one file of it (`only`)."""

    folder: Path
    only: str | None = None

    @property
    def label(self) -> str:
        """What the user calls it, for messages."""
        return str(self.folder if self.only is None else self.folder / self.only)

    @cached_property
    def names(self) -> Sequence[str]:
        """The files there are, sorted, by paths with `/` from its root."""
        if self.only is not None:
            return (self.only,)
        found = []
        for name in self._visible():
            found.append(name)
            if len(found) > MOST_FILES:
                raise FileFormatError(f"{self.folder} holds more than {MOST_FILES:,} files; give the folder inside.")
        return tuple(sorted(found))

    def _visible(self) -> Iterator[str]:
        """Its files but hidden ones, as far as they may be seen."""
        for root, folders, files in os.walk(self.folder):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            for file in files:
                path = Path(root, file)
                if not file.startswith(".") and os.path.isfile(path):  # False where it may not be
                    yield path.relative_to(self.folder).as_posix()

    def fetch(self, names: Iterable[str]) -> list[Path]:
        """Where these files lie on this machine; `FileFormatError` where they do not."""
        paths = [self.folder / name for name in names]
        for path in paths:
            if not path.is_file():
                raise FileFormatError(
                    f"There is no file {path}; the folder is incomplete, so download or save it again."
                )
        return paths

    def below(self, folder: str) -> "LocalFolder":
        """What lies in one of its folders, or one of its files alone."""
        path = self.folder / folder
        return LocalFolder(path.parent, path.name) if path.is_file() else LocalFolder(path)


@dataclass(frozen=True)
class HubFolder:
    """A repository of the hub, or a folder or file of it (`path`); offline, as much of it as was downloaded before.

    Its properties and methods are those of `LocalFolder`; fetching downloads.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    @property
    def label(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{at}" + (f"/{self.path}" if self.path else "")

    @cached_property
    def _offline(self) -> Path | None:
        """The folder of what was downloaded before; None where the hub answers."""
        if (problem := hub_problem()) is None:
            return None
        if (folder := downloaded(self.repo, revision=self.revision)) is None:
            raise FileFormatError(
                f"The dictionaries {self.label!r} are not on this machine, and the hub cannot be asked ({problem}); "
                f"{_INSTEAD}."
            )
        logger.warning(
            "%s comes from this machine's cache, revision %s, for the hub cannot be asked (%s).",
            self.label, folder.name[:12], problem,
        )  # fmt: skip
        return folder

    @cached_property
    def names(self) -> Sequence[str]:
        if self._offline is not None:
            every: Iterable[str] = (p.relative_to(self._offline).as_posix() for p in self._offline.rglob("*"))
            every = [name for name in every if (self._offline / name).is_file()]
        else:
            every = self._listed()
        if self.path in every:
            return (PurePosixPath(self.path).name,)
        prefix = f"{self.path}/" if self.path else ""
        names = sorted(name.removeprefix(prefix) for name in every if name.startswith(prefix))
        if not names:
            raise FileFormatError(
                f"{self.repo} has nothing at {self.path or 'its root'!r} {self._where}; its files lie in "
                f"{some({name.split('/')[0] for name in every})}."
            )
        return tuple(names)

    @property
    def _where(self) -> str:
        return "on the hub" if self._offline is None else "in this machine's cache"

    def _listed(self) -> list[str]:
        from huggingface_hub import HfApi

        try:
            return HfApi().list_repo_files(self.repo, revision=self.revision)
        except Exception as error:  # the hub client raises many kinds, of its own and of its HTTP library
            raise FileFormatError(
                f"The hub does not give {self.label!r} ({hub_says(error)}), and there is no such local folder; "
                f"{_INSTEAD}."
            ) from error

    def fetch(self, names: Iterable[str]) -> list[Path]:
        wanted = [self._in_repo(name) for name in names]
        folder = self._download(wanted) if self._offline is None else self._offline
        for name in wanted:
            if not (folder / name).is_file():
                raise FileFormatError(
                    f"{self.repo} has no file {name} {self._where}; "
                    + ("check the name." if self._offline is None else "load it once with the network.")
                )
        return [folder / name for name in wanted]

    def _in_repo(self, name: str) -> str:
        if PurePosixPath(self.path).name == name and self.names == (name,):
            return self.path
        return f"{self.path}/{name}" if self.path else name

    @cached_property
    def _commit(self) -> str:
        """Which commit the revision is now."""
        from huggingface_hub import HfApi

        return str(HfApi().model_info(self.repo, revision=self.revision).sha)

    def _download(self, names: list[str]) -> Path:
        from huggingface_hub import snapshot_download, try_to_load_from_cache

        literal = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]  # the client takes patterns
        try:
            here = [try_to_load_from_cache(self.repo, name, revision=self._commit) for name in names]
            if all(isinstance(path, str) for path in here):  # without the client's bars
                return Path(str(here[0])).parents[names[0].count("/")]
            return Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=literal))
        except Exception as error:  # as above
            raise FileFormatError(
                f"Could not download {names[0]} of {self.label!r} ({hub_says(error)}); {_INSTEAD}."
            ) from error

    def below(self, folder: str) -> "HubFolder":
        return HubFolder(self.repo, self.revision, f"{self.path}/{folder}" if self.path else folder)


@dataclass(frozen=True)
class ReleaseFolder(HubFolder):
    """What a release of SAELens' has in its repository."""

    release: Release = field(kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.release.name} ({super().label})"

    @cached_property
    def names(self) -> Sequence[str]:
        return tuple(name for name in super().names if self.release.holds(name))

    def only(self, id: str) -> "ReleaseFolder":
        """One dictionary of it."""
        return replace(self, release=self.release.only(id))


Source = LocalFolder | HubFolder


def names_in(folder: Path) -> Sequence[str]:
    """The files in a local folder, which may not exist."""
    return LocalFolder(folder).names if folder.is_dir() else ()


def folder_of(name: str) -> str:
    """The folder that one of the files of a source lies in; empty for its root."""
    return name.rpartition("/")[0]


def fetch_one(source: Source, name: str) -> Path:
    """Where one file of a source lies on this machine."""
    return source.fetch([name])[0]


def full_name(source: Source, name: str) -> str:
    """The whole path of one of its files, for what the folders above say."""
    if isinstance(source, LocalFolder):
        return (source.folder.absolute() / name).as_posix()
    inside = source.path if PurePosixPath(source.path).name == name == source.names[0] else f"{source.path}/{name}"
    return f"{source.repo}/{inside.lstrip('/')}"


def around(source: Source) -> Source:
    """The folder of a source that is one file; any other source itself."""
    if isinstance(source, LocalFolder):
        return LocalFolder(source.folder)
    is_file = source.path != "" and source.names == (PurePosixPath(source.path).name,)
    folder = str(PurePosixPath(source.path).parent) if is_file else source.path
    return HubFolder(source.repo, source.revision, "" if folder == "." else folder) if is_file else source


def above(source: Source) -> Source:
    """The folder that a folder lies in, as far as it belongs to the same source."""
    if isinstance(source, LocalFolder):
        return LocalFolder(source.folder.absolute().parent)
    folder = str(PurePosixPath(source.path).parent)
    return HubFolder(source.repo, source.revision, "" if folder == "." else folder)


def open_source(name: str | Path, revision: str | None = None) -> Source:
    """The source of this name, unread; `FileFormatError` where it is neither here nor a name of the hub's."""
    if str(name) == "":
        raise FileFormatError("The name of the dictionaries is empty (''); give a folder, or a hub name OWNER/NAME.")
    path = Path(name).expanduser()
    if path.exists() and revision is not None:
        raise FileFormatError(
            f"{path} lies on this machine, where there is no revision {revision!r}; leave the revision out."
        )
    if path.is_dir():
        settle(path)
        return LocalFolder(path)
    if path.is_file():
        return LocalFolder(path.parent, path.name)
    short, at, stated = str(name).partition("@")
    text = f"{SHORT_NAMES.get(short, short)}{at}{stated}"
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text:
        raise FileFormatError(f"There is no folder {path}; give a folder of dictionaries, or a hub name OWNER/NAME.")
    return _release_source(text, revision) or hub_source(text, revision)


def _release_source(name: str, revision: str | None) -> ReleaseFolder | None:
    """The repository of a release; None for names that none can have, or that are not known."""
    text, _, stated = name.partition("@")
    if "/" in name:
        return None
    if (release := release_named(text)) is None:
        if near := near_releases(text):
            raise FileFormatError(
                f"There is no folder {name}, and it is no hub name and no release of SAELens'; releases of "
                f"like names are {', '.join(near)}."
            )
        return None
    if stated and revision is not None and stated != revision:
        raise _two_revisions(name, stated, revision)
    return ReleaseFolder(release.repo, stated or revision, release=release)


def _two_revisions(name: str, *revisions: str) -> FileFormatError:
    return FileFormatError(f"{name} is asked for in two revisions ({', '.join(sorted(revisions))}); give one.")


def hub_source(name: str, revision: str | None = None) -> HubFolder:
    """The repository, revision and folder that a hub name such as `hf://OWNER/NAME@REVISION/FOLDER` speaks of."""
    place, _, query = name.removeprefix("hf://").partition("?")
    found = _NAME.fullmatch(place)
    if found is None:
        raise FileFormatError(
            f"There is no folder {name}, and it is no hub name; expected OWNER/NAME, with @REVISION and /SUB/FOLDER "
            "after it where needed, or a release of SAELens'."
        )
    asked = parse_qs(query).get("revision", [None])[0]
    stated = {text for text in (found["revision"], found["late"], asked, revision) if text is not None}
    if len(stated) > 1:
        raise _two_revisions(name, *stated)
    parts = [part for part in found["path"].split("/") if part]
    if ".." in "/".join([found["repo"], *parts, *stated]).split("/"):
        raise FileFormatError(f"{name} leads out of its repository by '..'; give a folder inside.")
    return HubFolder(found["repo"], next(iter(stated), None), "/".join(parts))


def some(names: Iterable[str], most: int = 12) -> str:
    """The first of some names, for messages."""
    every = sorted(" ".join(name.split())[:40] for name in names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
