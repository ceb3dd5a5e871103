"""circuit-tracer's sets: their settings, and the files that these list in this and in other repositories.

The layout is described in `circuit_tracer`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jsonschema import Draft202012Validator

from transcoders.dictionaries import DictionaryProvenance
from transcoders.errors import FileFormatError
from transcoders.formats.files import MOST_LAYERS, read_yaml, require_settings
from transcoders.formats.hooks import site_of_hook
from transcoders.formats.source import HubFolder, Source, hub_source
from transcoders.sites import SiteKind

CONFIG = "config.yaml"
KINDS = {"transcoder_set": "plt", "cross_layer_transcoder": "clt"}
_SCHEMA = Draft202012Validator(
    {
        "type": "object",
        "required": ["model_kind", "feature_input_hook", "feature_output_hook"],
        "properties": {
            "model_kind": {"enum": list(KINDS)},
            "feature_input_hook": {"type": "string", "maxLength": 200},
            "feature_output_hook": {"type": "string", "maxLength": 200},
            "transcoders": {"type": ["array", "object"], "minItems": 1, "maxItems": MOST_LAYERS},
            "activation": {"enum": ["topk", "relu", "jumprelu", "jump_relu", None]},
            "k": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31},
            "zero_positions": {"type": "integer", "minimum": 0, "maximum": 2**31},
        },
    }
)
UNSAID = {
    "model_kind": "cross_layer_transcoder",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}
"""What circuit-tracer takes a cross-layer transcoder without settings for."""
_CHAT_PREFIX = 4
"""`<bos><start_of_turn>user⏎`, before every prompt of an instruction-tuned Gemma 3."""


@dataclass(frozen=True)
class TracerSet:
    """One set of a source: its folder there and its settings."""

    source: Source
    folder: str
    path: Path | None
    """Of the settings; None where there are none."""
    config: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.source.label}/{self.folder}" if self.folder else self.source.label

    @property
    def kind(self) -> str:
        return KINDS[self.config["model_kind"]]

    @property
    def sites(self) -> tuple[SiteKind, SiteKind]:
        """The kinds of site that are read and written."""
        return self._site("feature_input_hook"), self._site("feature_output_hook")

    def _site(self, key: str) -> SiteKind:
        try:
            return site_of_hook(self.config[key], 0).kind
        except FileFormatError as error:
            raise FileFormatError(
                f"{self.path or self.label} has the {key} {self.config[key][:60]!r}, which is no place in a block that "
                "this package reads; such places are hook_resid_mid, ln2.hook_normalized, mlp.hook_in, mlp.hook_out "
                "and hook_mlp_out."
            ) from error

    def numbered(self, pattern: str) -> dict[int, str]:
        """Files of this folder by the number in their name, in its order."""
        names = (name.removeprefix(f"{self.folder}/") if self.folder else name for name in self.source.names)
        found = ((re.fullmatch(pattern, name), name) for name in names)
        numbers = dict(sorted((int(match[1]), name) for match, name in found if match))
        if numbers and max(numbers) >= MOST_LAYERS:
            raise FileFormatError(f"{self.label} has a file {numbers[max(numbers)]}; no model has that many layers.")
        return numbers

    def entries(self) -> dict[int, str]:
        """The file of each layer, in this folder or as `hf://…`: as listed, or by their names."""
        listed = self.config.get("transcoders")
        entries = self.numbered(r"layer_([0-9]{1,5})\.safetensors") if listed is None else self._listed(listed)
        if not entries:
            raise FileFormatError(
                f"{self.label} holds no layer_0.safetensors, and its {CONFIG} lists no files under 'transcoders'; "
                "download the folder again."
            )
        return entries

    def _listed(self, listed: Any) -> dict[int, str]:
        items = list(listed.items()) if isinstance(listed, dict) else [_numbered(i, e) for i, e in enumerate(listed)]
        entries = {int(layer): entry for layer, entry in items if _is_layer(layer) and _is_entry(entry)}
        if len(entries) < len(items):
            wrong = next((item for item in items if not (_is_layer(item[0]) and _is_entry(item[1]))), items[-1])
            raise FileFormatError(
                f"{self.path} lists {str(wrong[1])[:60]!r} for layer {str(wrong[0])[:20]}; expected for each layer "
                "one file inside of the folder, or hf://OWNER/NAME/FILE."
            )
        return dict(sorted(entries.items()))

    def fetched(self, entries: Mapping[int, str]) -> dict[int, Path]:
        """Where the files of layers lie on this machine; each repository is asked once, for these files alone."""
        places: dict[Source, dict[int, str]] = {}
        for layer, entry in entries.items():
            place, name = self._place(entry)
            places.setdefault(place, {})[layer] = name
        paths: dict[int, Path] = {}
        for place, named in places.items():
            paths |= dict(zip(named, place.fetch(named.values()), strict=True))
        return paths

    def across(self) -> list[str]:
        """The files of a cross-layer transcoder: as listed, or by their names."""
        if self.config.get("transcoders") is not None:
            return list(self.entries().values())
        return [name for kind in ("enc", "dec") for name in self.numbered(across_names(kind)).values()]

    def within(self, entry: str) -> str:
        """The name that a file of this folder has in the source."""
        return (PurePosixPath(self.folder) / entry).as_posix()

    def _place(self, entry: str) -> tuple[Source, str]:
        if not entry.startswith("hf://"):
            return self.source, self.within(entry)
        hub = hub_source(entry)
        if not hub.path:
            raise FileFormatError(f"{self.path} lists {entry}, which names no file; expected hf://OWNER/NAME/FILE.")
        return HubFolder(hub.repo, hub.revision), hub.path

    def provenance(self) -> DictionaryProvenance:
        model = str(self.config.get("model_name", "unknown"))
        bos = self.config.get("prepend_bos")
        return DictionaryProvenance(
            model=model,
            bos=bos if isinstance(bos, bool) else True,  # circuit-tracer puts a special token before every prompt
            config=_plain(dict(self.config)),
            first=int(self.config.get("zero_positions", first_position(model))),
        )


def across_names(kind: str) -> str:
    """The names of files of encoders or decoders."""
    return rf"W_{kind}_([0-9]{{1,5}})\.safetensors"


def first_position(model: str) -> int:
    """The first position with features."""
    return _CHAT_PREFIX if "gemma-3" in model and model.endswith("-it") else 1


def _numbered(position: int, entry: Any) -> tuple[Any, Any]:
    """Layer and file of an entry: its place in the list, unless it says so itself."""
    if isinstance(entry, dict):
        return entry.get("layer", position), entry.get("filepath", entry.get("path"))
    return position, entry


def _is_layer(value: Any) -> bool:
    text = str(value)
    return not isinstance(value, bool) and re.fullmatch(r"[0-9]{1,5}", text) is not None and int(text) < MOST_LAYERS


def _is_entry(value: Any) -> bool:
    """Whether it names a file inside of the folder or on the hub."""
    if not isinstance(value, str) or not 0 < len(value) <= 1000 or not value.isprintable():
        return False
    inside = not value.startswith(("/", "\\")) and ".." not in value and "://" not in value
    return value.startswith("hf://") or inside


def _plain(value: Any) -> Any:
    """Settings as JSON has them: YAML knows dates, too."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def configs_of(source: Source) -> list[str]:
    """The root's settings, or else those of folders inside."""
    found = [name for name in source.names if PurePosixPath(name).name == CONFIG]
    return [CONFIG] if CONFIG in found else found


def sets_of(source: Source) -> list[TracerSet]:
    configs = configs_of(source)
    found = []
    for name, path in zip(configs, source.fetch(configs) if configs else [], strict=True):
        config = read_yaml(path)
        if "model_kind" in config:
            require_settings(path, config, _SCHEMA)
            folder = PurePosixPath(name).parent.as_posix()
            found.append(TracerSet(source, "" if folder == "." else folder, path, config))
    return found or [TracerSet(source, "", None, UNSAID)]
