"""Write the table of SAELens' releases that `transcoders.formats.releases` reads, from SAELens' own registry.

    pip download sae-lens --no-deps -d WHEELS
    python benchmarks/interop/saelens_releases.py WHEELS/sae_lens-*.whl

The registry, `sae_lens/pretrained_saes.yaml`, says which repository holds a release and where in it a dictionary lies.
Kept are these facts: names, folders, L0, factors and settings that replace those of the files.
"""

import argparse
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).resolve().parents[2] / "transcoders" / "formats" / "saelens_releases.json.xz"
REGISTRY = "sae_lens/pretrained_saes.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="sae_lens-VERSION-py3-none-any.whl")
    wheel: Path = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as archive:
        registry = yaml.load(archive.read(REGISTRY), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = wheel.name.split("-")[1]
    table = {"saelens": version, "releases": {name: release(entry) for name, entry in sorted(registry.items())}}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    TABLE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    count = sum(len(entry["dictionaries"]) for entry in table["releases"].values())
    print(f"{len(registry)} releases, {count} dictionaries, {TABLE.stat().st_size / 1000:.1f} kB, SAELens {version}")


def release(entry: dict[str, Any]) -> dict[str, Any]:
    kept = {
        "repo": entry["repo_id"],
        "model": entry["model"],
        "conversion": entry.get("conversion_func"),
        "settings": entry.get("config_overrides"),
    }
    kept = {key: value for key, value in kept.items() if value}
    return kept | {"dictionaries": [dictionary(sae) for sae in entry["saes"]]}


def dictionary(sae: dict[str, Any]) -> list[Any]:
    """Its id, its folder where that is another, L0 and factor, without what is missing at the end."""
    id, folder = str(sae["id"]), str(sae["path"])  # YAML makes a number of 0
    row = [id, None if folder == id else folder, sae.get("l0"), sae.get("norm_scaling_factor")]
    while row[-1] is None:
        row.pop()
    return row


if __name__ == "__main__":
    main()
