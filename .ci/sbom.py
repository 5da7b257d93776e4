"""Write the software bill of materials of this tree as CycloneDX 1.5 JSON: `make sbom`, and beside every wheel.

It names lazyfs and every package that .ci/requirements.txt and .ci/build-requirements.txt pin, with version, hashes and
licence, what needs what, and whether lazyfs needs it to run ("required") or only to be built and tested ("excluded").
A hash is that of the file which pip took here where `.venv/*-report.json` tells it; else all that are allowed stand
there, one for each file of the release. The same tree and environment give the same document.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = (".ci/requirements.txt", ".ci/build-requirements.txt")
REPORTS = (".venv/report.json", ".venv/build-report.json")
SHIPPED = frozenset({"mount", "containerd", "snapshotter"})  # the extras of lazyfs that run on a node
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)[^\n]*")
_HASH = re.compile(r"--hash=sha256:(?P<digest>[0-9a-f]{64})")
_MAX_LICENCE = 100  # characters: some packages put the whole text there


@dataclass(frozen=True, slots=True)
class Pin:
    """A release that a lock file allows. `hashes`: SHA-256 in hex of its files, sorted."""

    name: str
    version: str
    hashes: tuple[str, ...]

    @property
    def ref(self) -> str:
        return f"pkg:pypi/{self.name}@{self.version}"


def read_pins(texts: Iterable[str]) -> dict[str, Pin]:
    """Return what lock files pin, by name. Raise ValueError for a line that is none, no hash, or two versions."""
    pins: dict[str, Pin] = {}
    for text in texts:
        bare = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
        for block in filter(str.strip, re.split(r"\n(?=\S)", bare)):
            found = _PIN.match(block)
            hashes = tuple(sorted(_HASH.findall(block)))
            if found is None or not hashes:
                raise ValueError(f"{block.splitlines()[0]!r} is not pinned with a hash")
            pin = Pin(canonicalize_name(found["name"]), found["version"], hashes)
            if pins.setdefault(pin.name, pin) != pin:
                raise ValueError(f"{pin.name} is pinned twice, and not alike")
    return pins


def read_taken(reports: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return which file pip took of each package: name → SHA-256, from its installation reports."""
    taken: dict[str, str] = {}
    for report in reports:
        for item in report["install"]:
            digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "")
            taken[canonicalize_name(item["metadata"]["name"])] = digest
    return taken


def needs(name: str, extras: Iterable[str] = ()) -> list[str]:
    """Return the names of what an installed distribution needs here; nothing where it isn't installed."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    found: set[str] = set()
    for need in map(Requirement, lines):
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.add(canonicalize_name(need.name))
    return sorted(found - {canonicalize_name(name)})


def reach(start: Iterable[str]) -> Iterator[str]:
    """Yield these distributions and everything that they need, each once."""
    todo, seen = list(start), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            yield name
            todo += needs(name)


def licences(name: str) -> list[dict[str, Any]]:
    """Return what an installed distribution says of its licence in few words, as CycloneDX has it; [] for nothing."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return []
    if "License-Expression" in about:
        return [{"expression": about["License-Expression"]}]
    said = next(iter(about.get_all("License") or ()), "")
    if said and len(said) <= _MAX_LICENCE and "\n" not in said:
        return [{"license": {"name": said}}]
    words = [line.split(" :: ") for line in about.get_all("Classifier") or ()]
    return [{"license": {"name": word[-1]}} for word in words if word[0] == "License"]


def component(pin: Pin, taken: str, *, required: bool) -> dict[str, Any]:
    """Return one package's entry. `taken`: the file that is installed, "" where that is not known."""
    if taken and taken not in pin.hashes:
        raise ValueError(f"{pin.name} {pin.version} was installed from a file that the lock does not allow")
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": pin.ref,
        "name": pin.name,
        "version": pin.version,
        "scope": "required" if required else "excluded",
        "purl": pin.ref,
        "hashes": [{"alg": "SHA-256", "content": digest} for digest in ((taken,) if taken else pin.hashes)],
    }
    if said := licences(pin.name):
        entry["licenses"] = said
    return entry


def document(version: str, pins: Mapping[str, Pin], taken: Mapping[str, str]) -> dict[str, Any]:
    """Return the whole document. Raise ValueError where what is installed is not what is pinned."""
    for name, pin in pins.items():
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # only for another Python or processor
        if here != pin.version:
            raise ValueError(f"{name} {here} is installed, and {pin.version} is pinned: run `make venv`")
    direct = needs("lazyfs", SHIPPED)
    required = set(reach(direct))
    ours = f"pkg:pypi/lazyfs@{version}"
    components = [component(pins[name], taken.get(name, ""), required=name in required) for name in sorted(pins)]
    graph = [{"ref": ours, "dependsOn": [pins[name].ref for name in direct if name in pins]}]
    graph += [
        {"ref": pins[name].ref, "dependsOn": [pins[need].ref for need in needs(name) if need in pins]}
        for name in sorted(pins)
    ]
    found = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": ours, "name": "lazyfs", "version": version, "purl": ours}
        },
        "components": components,
        "dependencies": graph,
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(found, sort_keys=True))
    return {**found, "serialNumber": f"urn:uuid:{number}"}


def main() -> int:
    """Write the document to the file that is named, or to standard output."""
    parser = argparse.ArgumentParser(description="Write the software bill of materials as CycloneDX JSON.")
    parser.add_argument("output", nargs="?", type=Path)
    args = parser.parse_args()
    try:
        pins = read_pins((ROOT / name).read_text() for name in LOCKS)
        taken = read_taken(json.loads((ROOT / name).read_text()) for name in REPORTS if (ROOT / name).exists())
        text = json.dumps(document(metadata.version("lazyfs"), pins, taken), indent=2) + "\n"
        if args.output is None:
            sys.stdout.write(text)
        else:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(text)
    except (OSError, ValueError, metadata.PackageNotFoundError) as error:
        print(f"the bill of materials can't be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
