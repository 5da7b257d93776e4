"""What `make` installs is pinned with hashes, and the bill of materials names all of it."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lazyfs_sbom", ROOT / ".ci" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


sbom = _load()
TEXTS = [(ROOT / name).read_text() for name in sbom.LOCKS]
PINS = sbom.read_pins(TEXTS)
PIN = "one==1.0 ; sys_platform == 'linux' \\\n    --hash=sha256:" + "ab" * 32 + "\n"


def test_all_that_lazyfs_asks_for_is_pinned_to_something_that_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = list(project["build-system"]["requires"] + project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        asked += extra
    for need in map(Requirement, asked):
        if need.name != "lazyfs":
            assert need.specifier.contains(PINS[canonicalize_name(need.name)].version), need


def test_whoever_installs_chooses_the_index() -> None:
    for text in TEXTS:
        assert "://" not in text and "index" not in text and "find-links" not in text
        assert "{ " not in text and " @ " not in text


def test_every_pinned_package_is_named_with_version_and_hash() -> None:
    made = sbom.document("1.2.3", PINS, {})
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.5")
    assert made["metadata"]["component"]["purl"] == "pkg:pypi/lazyfs@1.2.3"
    named = {(c["name"], c["version"]): {h["content"] for h in c["hashes"]} for c in made["components"]}
    assert named == {(pin.name, pin.version): set(pin.hashes) for pin in PINS.values()}
    assert len(named) > 50 and all(named.values())
    scope = {c["name"]: c["scope"] for c in made["components"]}
    assert {scope[name] for name in ("requests", "urllib3", "trio", "pyfuse3", "grpcio", "sniffio")} == {"required"}
    assert {scope[name] for name in ("pytest", "mypy", "matplotlib", "cython", "setuptools")} == {"excluded"}
    needed = {entry["ref"]: entry["dependsOn"] for entry in made["dependencies"]}
    assert PINS["requests"].ref in needed["pkg:pypi/lazyfs@1.2.3"]
    assert PINS["urllib3"].ref in needed[PINS["requests"].ref]
    known = {c["bom-ref"] for c in made["components"]}
    assert known >= {ref for refs in needed.values() for ref in refs}
    assert sbom.document("1.2.3", PINS, {}) == made


def _report(name: str, digest: str) -> dict[str, Any]:
    info = {"url": "file", "archive_info": {"hashes": {"sha256": digest}}}
    return {"install": [{"metadata": {"name": name}, "download_info": info}]}


def test_the_file_that_was_taken_is_told_where_pip_wrote_it_down() -> None:
    digest = PINS["trio"].hashes[0]
    made = sbom.document("1", PINS, sbom.read_taken([_report("Trio", digest)]))
    (trio,) = (c for c in made["components"] if c["name"] == "trio")
    assert trio["hashes"] == [{"alg": "SHA-256", "content": digest}]
    with pytest.raises(ValueError, match="does not allow"):
        sbom.document("1", PINS, sbom.read_taken([_report("trio", "0" * 64)]))


def test_another_version_than_the_pinned_one_is_told() -> None:
    other = sbom.Pin("trio", "0.0.1", PINS["trio"].hashes)
    with pytest.raises(ValueError, match="run `make venv`"):
        sbom.document("1", {**PINS, "trio": other}, {})


@pytest.mark.parametrize(
    "text", ["one>=1\n", "one==1.0\n", "-e .\n", "one @ file:///x\n", PIN + PIN.replace("1.0", "1.1")]
)
def test_what_is_not_pinned_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pinned"):
        sbom.read_pins([text])
    assert sbom.read_pins(["# made\n" + PIN])["one"].hashes == ("ab" * 32,)
