"""A small image that runs: programs of this machine with the libraries that they need, as a tree or an OCI layout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

_PROGRAMS = ("sh", "cat", "id", "sleep", "env", "stat", "touch", "mkdir", "readlink", "stty", "tty", "head", "chown")


def make_tree(root: Path) -> None:
    """Make the root file system `root`, with two users: root and web (33, group 34 and member of 77)."""
    for part in ("usr/bin", "etc", "root", "tmp"):
        (root / part).mkdir(parents=True)
    for program in _PROGRAMS:
        path = shutil.which(program)
        assert path is not None
        shutil.copy2(os.path.realpath(path), root / "usr/bin" / program)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            target = root / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(os.path.realpath(library), target)
    shutil.copy2(root / "usr/bin/id", root / "usr/bin/id-as-root")
    (root / "usr/bin/id-as-root").chmod(0o4755)
    (root / "bin").symlink_to("usr/bin")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nweb:x:34:\nlogs:x:77:other,web\n")
    (root / "etc/plain").write_text("no program\n")


def make_layout(tree: Path, layout: Path, config: dict[str, Any]) -> str:
    """Write `tree` as the one uncompressed layer of an image into the new OCI layout `layout`; return its reference."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    layer = layout / "layer.tar"
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tree, ".")
    raw = layer.read_bytes()
    layer.unlink()

    def store(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    kind = "application/vnd.oci.image"
    layer_descriptor = store(raw, f"{kind}.layer.v1.tar")
    document = {
        "os": "linux",
        "architecture": "amd64",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer_descriptor["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": store(json.dumps(document).encode(), f"{kind}.config.v1+json"),
        "layers": [layer_descriptor],
    }
    entry = store(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "small"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return f"oci:{layout}:small"
