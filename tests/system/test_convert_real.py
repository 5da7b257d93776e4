"""`lazyfs convert` as a command, on OCI layouts and a real registry, read back by programs that are not ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import real, tars
from tests.helpers.odd import odd_tar
from tests.helpers.tars import dir_, file, symlink, tar_of

PLAIN = tar_of(
    dir_("etc"), file("etc/hosts", b"127.0.0.1 localhost\n"), symlink("link", "etc/hosts"),
    *(file(f"data/{i:03}", hashlib.sha256(b"%d" % i).digest() * (i * 100)) for i in range(200)),
)  # fmt: skip


def run(*command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not ok or done.returncode == 0, done.stderr
    return done


def lazyfs(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "lazyfs", *arguments, ok=ok)


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"these tests need {', '.join(missing)}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with one image of two layers, made by umoci."""
    need("umoci")
    directory = tmp_path_factory.mktemp("made")
    found = directory / "source"
    run("umoci", "init", "--layout", str(found))
    run("umoci", "new", "--image", f"{found}:base")
    for number, tar in enumerate((PLAIN, tar_of(tars.whiteout("etc/hosts"), file("etc/motd", b"hello")))):
        path = directory / f"{number}.tar"
        path.write_bytes(tar)
        run("umoci", "raw", "add-layer", "--image", f"{found}:base", str(path))
    return found


@pytest.fixture
def layout(made: Path, tmp_path: Path) -> Path:
    """A copy of that layout: tests add images to it."""
    return shutil.copytree(made, tmp_path / "source")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Debian's docker-registry on a free port."""
    with real.docker_registry(tmp_path / "registry") as running:
        yield running.host


def manifest_of(layout: Path, tag: str) -> dict[str, object]:
    found = run("skopeo", "inspect", "--raw", f"oci:{layout}:{tag}").stdout
    loaded: dict[str, object] = json.loads(found)
    return loaded


def diff_ids(reference: str, *options: str) -> list[str]:
    config = json.loads(run("skopeo", "inspect", *options, "--config", "--raw", reference).stdout)
    found: list[str] = config["rootfs"]["diff_ids"]
    return found


def test_layout_to_layout_unpacks_to_the_same_tar(layout: Path, tmp_path: Path) -> None:
    need("zstd", "skopeo")
    target = tmp_path / "target"
    report = json.loads(lazyfs("convert", "--json", f"oci:{layout}:base", f"oci:{target}:lazy").stdout)
    assert [layer["action"] for layer in report["layers"]] == ["converted", "converted"]
    assert diff_ids(f"oci:{layout}:base") == diff_ids(f"oci:{target}:lazy")
    blob = target / "blobs" / "sha256" / report["layers"][0]["result"]["digest"][7:]
    unpacked = subprocess.run(["zstd", "-dcq", str(blob)], check=True, capture_output=True, timeout=60).stdout
    assert unpacked == PLAIN
    manifest = manifest_of(target, "lazy")
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert sorted(path.name for path in target.iterdir()) == ["blobs", "index.json", "oci-layout"]
    text = lazyfs("convert", f"oci:{layout}:base", f"oci:{target}:lazy").stdout
    assert text.count("reused") == 2 and report["manifest"] in text


def test_registry_to_registry(layout: Path, registry: str, tmp_path: Path) -> None:
    run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}:base", f"docker://{registry}/app:1")
    first = json.loads(lazyfs("convert", "--json", f"{registry}/app:1", f"{registry}/lazy:1").stdout)
    again = json.loads(lazyfs("convert", "--json", f"{registry}/app:1", f"{registry}/lazy:1").stdout)
    assert first["manifest"] == again["manifest"] and again["pushed"] == 0
    assert [layer["action"] for layer in again["layers"]] == ["reused", "reused"]
    # An ordinary client takes the converted image, verifying blobs and diff IDs as it copies.
    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{registry}/lazy:1", f"oci:{tmp_path}/pulled:x")
    assert diff_ids(f"oci:{tmp_path}/pulled:x") == diff_ids(f"oci:{layout}:base")


def test_everything_odd_unpacks_to_the_same_tree(layout: Path, tmp_path: Path) -> None:
    """umoci is the judge: the tar that went in and the tar that comes out give it one tree."""
    need("umoci", "zstd")
    (tmp_path / "odd.tar").write_bytes(odd_tar())
    run("umoci", "new", "--image", f"{layout}:odd")
    run("umoci", "raw", "add-layer", "--image", f"{layout}:odd", str(tmp_path / "odd.tar"))
    report = json.loads(lazyfs("convert", "--json", f"oci:{layout}:odd", f"oci:{tmp_path}/target:odd").stdout)
    assert report["layers"][0]["diff_id_kept"] is False  # it holds sparse files
    blob = tmp_path / "target" / "blobs" / "sha256" / report["layers"][0]["result"]["digest"][7:]
    run("zstd", "-dcqf", str(blob), "-o", str(tmp_path / "converted.tar"))
    run("umoci", "new", "--image", f"{layout}:converted")
    run("umoci", "raw", "add-layer", "--image", f"{layout}:converted", str(tmp_path / "converted.tar"))
    shown = []
    for tag in ("odd", "converted"):
        run("umoci", "raw", "unpack", "--image", f"{layout}:{tag}", str(tmp_path / tag))
        shown.append(listing(tmp_path / tag))
    assert shown[0] == shown[1] and len(shown[0]) > 180


def listing(root: Path) -> dict[bytes, tuple[object, ...]]:
    out: dict[bytes, tuple[object, ...]] = {}
    for directory, names, files in os.walk(os.fsencode(root)):
        for name in names + files:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            content: object = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as handle:
                    content = hashlib.sha256(handle.read()).digest()
            times = None if os.path.isdir(path) else info.st_mtime_ns
            attributes = (
                ()
                if os.path.islink(path)
                else tuple((key, os.getxattr(path, key)) for key in sorted(os.listxattr(path)))
            )
            key = os.path.relpath(path, os.fsencode(root))
            out[key] = (attributes, info.st_mode, info.st_uid, info.st_gid, info.st_rdev, times, info.st_nlink, content)
    return out


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with an image that takes long to convert."""
    need("umoci")
    directory = tmp_path_factory.mktemp("big")
    found, tar = directory / "source", directory / "big.tar"
    run("umoci", "init", "--layout", str(found))
    run("umoci", "new", "--image", f"{found}:base")
    tar.write_bytes(tar_of(*(file(f"f{i}", os.urandom(1 << 20)) for i in range(60))))
    run("umoci", "raw", "add-layer", "--image", f"{found}:base", str(tar))
    tar.unlink()
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(big: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    target = tmp_path / "target"
    target.mkdir()
    work = tmp_path / "work"
    report = tmp_path / "report.json"
    command = ["-q", "convert", "--level", "19", "--work-dir", str(work), "--report", str(report)]
    command += [f"oci:{big}:base", f"oci:{target}:lazy"]
    process = subprocess.Popen([sys.executable, "-m", "lazyfs", *command], stderr=subprocess.PIPE)
    try:
        for _ in range(3000):
            if any(path.stat().st_size for path in work.glob("runs/*/[0-9a-f]*")):
                break
            time.sleep(0.02)
        else:
            pytest.fail("the conversion never began")
        process.send_signal(number)
    finally:
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert list(target.iterdir()) == [] and list((work / "runs").iterdir()) == []
    assert json.loads(report.read_text())["error"]["exit_code"] == code


def test_failures_are_sentences_with_exit_codes(layout: Path, tmp_path: Path) -> None:
    target = f"oci:{tmp_path}/target:x"
    missing = lazyfs("convert", f"oci:{layout}:nothing", target, ok=False)
    assert missing.returncode == 3 and "nothing" in missing.stderr and "Traceback" not in missing.stderr
    level = lazyfs("convert", "--level", "99", f"oci:{layout}:base", target, ok=False)
    assert level.returncode == 2 and "1 to 22" in level.stderr
    (tmp_path / "bad.tar").write_bytes(tar_of(file("../../escape", b"x")))
    run("umoci", "new", "--image", f"{layout}:bad")
    run("umoci", "raw", "add-layer", "--image", f"{layout}:bad", str(tmp_path / "bad.tar"))
    attack = lazyfs("convert", f"oci:{layout}:bad", target, ok=False)
    assert attack.returncode == 7 and "../../escape" in attack.stderr
    assert not (tmp_path / "target").exists()
    shown = lazyfs("convert", "--help").stdout
    assert "examples:" in shown and "--level" in shown
