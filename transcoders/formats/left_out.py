"""Positions without features, beside dictionaries in a format that has no room for them: `left_out.json`.

    {"first": 1, "limits": {"3.mlp_out": 812.5}}

`DictionaryProvenance.first` and `limits`. Other packages do not read it: they have features at such tokens as well.
"""

from dataclasses import replace
from pathlib import Path

from jsonschema import Draft202012Validator

from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.files import write_json
from transcoders.formats.files import read_json, read_site, require_settings
from transcoders.formats.native import PROVENANCE
from transcoders.formats.source import Source, fetch_one

NAME = "left_out.json"
_DEFAULT = DictionaryProvenance(model="")
_KEYS = ("first", "limits")
_SCHEMA = Draft202012Validator(
    {"type": "object", "required": list(_KEYS), "properties": {key: PROVENANCE["properties"][key] for key in _KEYS}}
)


def save_left_out(dictionaries: DictionarySet, folder: Path) -> None:
    """Into a folder of another format, where it says more than that position 0 has no features."""
    said = dictionaries.provenance
    if said.first == _DEFAULT.first and not said.limits:
        (folder / NAME).unlink(missing_ok=True)  # of dictionaries that were there before
    else:
        write_json(folder / NAME, {"first": said.first, "limits": dict(said.limits)})


def with_left_out(dictionaries: DictionarySet, source: Source) -> DictionarySet:
    """The same dictionaries, with what a file beside them says, where there is one; `FileFormatError` for nonsense."""
    if NAME not in source.names:
        return dictionaries
    record = read_json(path := fetch_one(source, NAME))
    require_settings(path, record, _SCHEMA)
    for site in record["limits"]:
        read_site(path, site)
    limits = {site: float(limit) for site, limit in record["limits"].items()}
    dictionaries.provenance = replace(dictionaries.provenance, first=record["first"], limits=limits)
    return dictionaries
