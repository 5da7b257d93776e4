"""`lazyfs convert` in pipelines: whole indexes, kills, caches and reports, read back by programs that are not ours."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazyfs import oci, reference
from lazyfs.digest import of
from lazyfs.registry.open import open_repository
from tests.faults.cases import Area, Case, shows
from tests.helpers import real
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.real import DockerRegistry
from tests.helpers.tars import file, tar_of

EMPTY_CONFIG = b"{}"


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


def convert(*words: str | Path, work: Path | None = None, ok: bool = True) -> Done:
    command = [sys.executable, "-m", "lazyfs", "convert", "--json", *(str(word) for word in words)]
    if work is not None:
        command += ["--work-dir", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not ok or done.returncode == 0, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def put(blobs: Path, raw: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    digest = hashlib.sha256(raw).hexdigest()
    (blobs / digest).write_bytes(raw)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(raw), **more}


def multi_platform(layout: Path, sizes: int = 200_000) -> str:
    """Write a layout with an index of two platforms that share a layer, and buildkit's attestation of the first."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    kind = "application/vnd.oci.image"
    shared = tar_of(file("etc/shared", hashlib.sha256(b"shared").digest() * (sizes // 32)))
    entries = []
    for architecture in ("amd64", "arm64"):
        own = tar_of(file("bin/own", hashlib.sha256(architecture.encode()).digest() * (sizes // 32)))
        config = {
            "os": "linux",
            "architecture": architecture,
            "rootfs": {
                "type": "layers",
                "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in (shared, own)],
            },
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": put(blobs, json.dumps(config).encode(), f"{kind}.config.v1+json"),
            "layers": [put(blobs, tar, f"{kind}.layer.v1.tar") for tar in (shared, own)],
        }
        raw = json.dumps(manifest).encode()
        platform = {"os": "linux", "architecture": architecture}
        entries.append(put(blobs, raw, f"{kind}.manifest.v1+json", platform=platform))
    statement = b'{"_type": "https://in-toto.io/Statement/v0.1"}'
    attestation = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": put(blobs, b'{"os": "unknown", "architecture": "unknown"}', f"{kind}.config.v1+json"),
        "layers": [put(blobs, statement, "application/vnd.in-toto+json")],
    }
    entries.append(
        put(
            blobs,
            json.dumps(attestation).encode(),
            f"{kind}.manifest.v1+json",
            platform={"os": "unknown", "architecture": "unknown"},
            annotations={
                "vnd.docker.reference.type": "attestation-manifest",
                "vnd.docker.reference.digest": entries[0]["digest"],
            },
        )
    )
    index = {"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": entries}
    named = put(blobs, json.dumps(index).encode(), f"{kind}.index.v1+json")
    named["annotations"] = {"org.opencontainers.image.ref.name": "multi"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return f"oci:{layout}:multi"


def raw_of(reference: str) -> dict[str, Any]:
    flags = ["--tls-verify=false"] if reference.startswith("docker://127.") else []
    found: dict[str, Any] = json.loads(real.call("skopeo", "inspect", "--raw", *flags, reference))
    return found


def test_a_whole_index_through_a_real_registry(docker_registry: DockerRegistry, tmp_path: Path) -> None:
    source = multi_platform(tmp_path / "source")
    in_registry = docker_registry.image("pipe/app", "1")
    real.copy_image(source, in_registry, "--all")
    destination = docker_registry.image("pipe/lazy", "1")
    done = convert("--all-platforms", in_registry, destination, work=tmp_path / "work")
    index = raw_of(destination)
    platforms = [entry["platform"]["architecture"] for entry in index["manifests"]]
    assert platforms == ["amd64", "arm64", "unknown"]
    assert index["manifests"][2]["annotations"]["vnd.docker.reference.digest"] == index["manifests"][0]["digest"]
    assert [image["platform"] for image in done.report["images"]] == ["linux/amd64", "linux/arm64"]
    assert done.report["mounted"] > 0  # what is kept was taken over inside of the registry
    assert "attestation" in done.err
    # An ordinary client takes all of it, verifying every blob and diff ID.
    real.call(
        "skopeo", "--insecure-policy", "copy", "-q", "--all", "--src-tls-verify=false", destination,
        f"oci:{tmp_path}/pulled:x",
    )  # fmt: skip
    again = convert("--all-platforms", in_registry, destination, work=tmp_path / "other-work")
    assert again.report["manifest"] == done.report["manifest"] and again.report["pushed"] == 0
    one = convert("--platform", "linux/arm64", in_registry, docker_registry.image("pipe/lazy", "arm"))
    assert "linux/amd64" in one.err and one.report["images"][0]["manifest"] == index["manifests"][1]["digest"]


@pytest.fixture
def big(tmp_path: Path) -> str:
    """A layout with an image of two layers that take a while."""
    layout = tmp_path / "big"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    kind = "application/vnd.oci.image"
    small = tar_of(file("small", b"x" * 50_000))
    large = tar_of(*(file(f"f{number}", os.urandom(1 << 20)) for number in range(10)))
    config = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {
            "type": "layers",
            "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in (small, large)],
        },
    }
    manifest = {
        "schemaVersion": 2,
        "config": put(blobs, json.dumps(config).encode(), f"{kind}.config.v1+json"),
        "layers": [put(blobs, tar, f"{kind}.layer.v1.tar") for tar in (small, large)],
    }
    entry = put(blobs, json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "big"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return f"oci:{layout}:big"


def kill_when(ready: Callable[[], bool], *words: str | Path) -> None:
    """Start a conversion and kill it -9 as soon as `ready` says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lazyfs", "-q", "convert", *(str(word) for word in words)], stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@shows(
    Case(
        "processes-convert-killed-layer",
        Area.PROCESSES,
        "`lazyfs convert` is killed (-9) in the middle of a layer",
        "no reader yet: nothing was pushed",
        "the next one takes the layers that were done, and removes what that one left",
    )
)
def test_killed_in_the_middle_of_a_layer(big: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with FakeRegistry() as registry:
        destination = f"{registry.host}/lazy:1"
        # Once the small layer is done and the large one is not.
        kill_when(
            lambda: len(list(work.glob("layers/*.json"))) == 1,
            "--jobs", "1", "--level", "13", "--work-dir", work, big, destination,
        )  # fmt: skip
        assert not registry.requests or registry.count("PUT") == 0
        assert list((work / "runs").iterdir())
        report = convert("--level", "13", big, destination, work=work).report
        assert [layer["action"] for layer in report["layers"]] == ["reused", "converted"]
        assert report["layers"][0]["reused_from"] == "work directory"
        # Nothing is left but the records.
        assert not list((work / "runs").iterdir())
        assert all(path.suffix == ".json" for path in (work / "layers").iterdir())


@shows(
    Case(
        "processes-convert-killed-push",
        Area.PROCESSES,
        "`lazyfs convert` is killed (-9) in the middle of a push",
        "no reader yet: the tag comes last",
        "the next one converts nothing again, and pushes what had not arrived",
    )
)
def test_killed_in_the_middle_of_a_push(big: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with FakeRegistry() as registry:
        destination = f"{registry.host}/lazy:1"
        clean = convert(big, f"oci:{tmp_path}/clean:x", work=tmp_path / "other").report
        small = clean["layers"][0]["result"]["digest"]
        large = clean["layers"][1]["result"]["digest"]
        # The large layer's upload is answered never; the small one's arrives.
        registry.fault(Fault.BLACK_HOLE, method="PUT", path=large[7:])
        kill_when(
            lambda: small in registry.blobs and registry.count("PUT", large[7:]) == 1,
            "--work-dir",
            work,
            big,
            destination,
        )
        registry.clear_faults()
        registry.clear_log()
        done = convert(big, destination, work=work).report
        assert done["manifest"] == clean["manifest"]
        assert {layer["action"] for layer in done["layers"]} == {"reused"}
        # The config goes beside the layers: it may have arrived before the kill, or not.
        assert [registry.count("PUT", digest[7:]) for digest in (small, large)] == [0, 1]
        assert all(path.suffix == ".json" for path in (work / "layers").iterdir())


def test_a_cache_repository_between_machines(docker_registry: DockerRegistry, big: str, tmp_path: Path) -> None:
    cache = docker_registry.image("pipe/cache", "latest").removesuffix(":latest")
    first = convert(
        "--cache-repo", cache, big, docker_registry.image("pipe/first", "1"), work=tmp_path / "machine1"
    ).report
    second = convert(
        "--cache-repo", cache, big, docker_registry.image("pipe/second", "1"), work=tmp_path / "machine2"
    ).report
    assert second["manifest"] == first["manifest"]
    assert {layer["reused_from"] for layer in second["layers"]} == {"cache repository"}
    assert second["mounted"] >= second["size"] and second["pushed"] < 10_000
    wrong = convert("--cache-repo", docker_registry.image("pipe/cache", "x"), big, "oci:y:z", ok=False)
    assert wrong.code == 2 and "repository" in wrong.err


def test_what_refers_to_an_image_follows_it_by_the_fallback_tag(
    docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    """Debian's registry has no referrers API: the tag sha256-<hex> is the list."""
    source = docker_registry.image("pipe/signed", "1")
    real.call(
        "skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "--override-arch", "amd64",
        multi_platform(tmp_path / "source"), source,
    )  # fmt: skip
    repository = open_repository(reference.parse(source))
    media_type, raw = repository.manifest("1")
    for blob in (EMPTY_CONFIG, b"an SBOM"):
        repository.push_blob(of(blob), len(blob), io.BytesIO(blob))
    sbom = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "artifactType": "application/spdx+json",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": of(EMPTY_CONFIG), "size": 2},
            "layers": [{"mediaType": "text/plain", "digest": of(b"an SBOM"), "size": 7}],
            "subject": {"mediaType": media_type, "digest": of(raw), "size": len(raw)},
        }
    )
    repository.push_manifest(of(sbom), oci.OCI_MANIFEST, sbom)
    assert [entry.digest for entry in repository.referrers(of(raw))] == [of(sbom)]
    repository.close()
    destination = docker_registry.image("pipe/signed-lazy", "1")
    report = convert("--copy-referrers", source, destination).report
    (told,) = report["referrers"]
    assert told["type"] == "application/spdx+json" and told["copy"]
    copied = open_repository(reference.parse(destination))
    assert [entry.digest for entry in copied.referrers(report["manifest"])] == [told["copy"]]
    copied.close()


def test_a_report_on_success_and_on_failure(big: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = convert("--report", path, big, f"oci:{tmp_path}/out:x", work=tmp_path / "work")
    written = json.loads(path.read_text())
    assert {**written, "started": None} == {**done.report, "started": None}
    assert written["status"] == "converted" and written["started"].endswith("Z")
    with FakeRegistry() as registry:
        registry.fault(Fault.STATUS, method="POST", status=400)
        failed = convert("--report", path, big, f"{registry.host}/lazy:1", work=tmp_path / "work", ok=False)
    told = json.loads(path.read_text())
    assert told["status"] == "failed" and told["error"]["exit_code"] == failed.code == 5
    assert told["error"]["class"] == "PushRejected" and len(told["layers"]) == 2
    assert list(tmp_path.glob(".report*")) == []
    nowhere = convert("--report", tmp_path / "no/such/place", big, "oci:x:y", ok=False)
    assert nowhere.code == 2 and "no place for a file" in nowhere.err


def test_a_work_directory_that_cannot_be_had(big: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    named = convert(big, f"oci:{tmp_path}/out:x", work=tmp_path / "file", ok=False)
    assert named.code == 9 and "--work-dir" in named.err
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    usual = subprocess.run(
        [sys.executable, "-m", "lazyfs", "convert", big, f"oci:{tmp_path}/out:x"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert usual.returncode == 0 and "from the beginning" in usual.stderr


def test_docker_media_types_stay_where_they_are_asked_for(
    docker_registry: DockerRegistry, containerd: real.Containerd, tmp_path: Path
) -> None:
    """A Docker manifest whose layers carry annotations all the same: registry, skopeo and containerd take it."""
    source = docker_registry.image("pipe/docker", "1")
    real.call(
        "skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "--format", "v2s2", "--override-arch",
        "amd64", multi_platform(tmp_path / "source"), source,
    )  # fmt: skip
    destination = docker_registry.image("pipe/docker", "esgz")
    done = convert("--docker", "--format", "estargz", source, destination)
    manifest = raw_of(destination)
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert all("containerd.io/snapshot/stargz/toc.digest" in layer["annotations"] for layer in manifest["layers"])
    assert "annotations" in done.err
    real.call(
        "skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", destination, f"oci:{tmp_path}/pulled:x"
    )
    containerd.pull(destination.removeprefix("docker://"))
    refused = convert("--docker", source, destination, ok=False)
    assert refused.code == 2 and "--format estargz" in refused.err
    plain = convert(source, docker_registry.image("pipe/docker", "oci"))
    assert raw_of(docker_registry.image("pipe/docker", "oci"))["mediaType"].startswith("application/vnd.oci.")
    assert plain.report["form"] == "zstd-chunked"
