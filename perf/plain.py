"""How soon is an image without TOCs mountable, beside containerd's pull and beside curl, gzip and tar?

    python -m perf.plain [--pairs 3] [--layers 1] [--compression gzip|zstd] [--tar FILE]

Prints one JSON line a run and one with the medians. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tarfile
import time
from pathlib import Path

from perf import debian, lazy_image, machine
from perf.demo import manifest_of
from perf.start import drop_caches, scratch
from tests.helpers import real

FASTER = 3.0  # times as fast as containerd's pull and unpack
SHARE = 0.7  # of the speed of curl, gzip and tar
_DECODERS = {"gzip": "gzip -d", "zstd": "zstd -dcq"}


def split(tar: Path, into: int, directory: Path) -> list[Path]:
    """Cut a tar into `into` tars of about the same size, in order. Blocking."""
    if into == 1:
        return [tar]
    parts = [directory / f"part{number}.tar" for number in range(into)]
    share = tar.stat().st_size // into + 1
    with tarfile.open(tar) as source:
        written, number = 0, 0
        out = tarfile.open(parts[0], "w", format=tarfile.PAX_FORMAT)
        for member in source:
            if written > share and number + 1 < into and not member.islnk():
                out.close()
                written, number = 0, number + 1
                out = tarfile.open(parts[number], "w", format=tarfile.PAX_FORMAT)
            if member.islnk() and written == 0:
                continue
            out.addfile(member, source.extractfile(member) if member.isreg() else None)
            written += member.size + 1024
        out.close()
    return parts


def publish(tars: list[Path], compression: str, directory: Path, image: str) -> None:
    """Push an image of these layers."""
    layout = real.build_layout(directory / "layout", "plain", tars)
    if compression == "gzip":
        real.copy_image(layout, image)
        return
    flags = ("--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--dest-compress-format", compression)
    real.call("skopeo", *flags, "--dest-compress", layout, image)


def by_hand(urls: list[str], compression: str, target: Path) -> float:
    """Return the seconds that curl, a decoder and tar take for all layers, one after another."""
    target.mkdir()
    began = time.monotonic()
    for url in urls:
        line = f'set -e; curl -sS --fail --noproxy "*" "$1" | {_DECODERS[compression]} | tar -x -C "$2"'
        subprocess.run(["/bin/sh", "-c", line, "sh", url, str(target)], check=True, timeout=1800)
    return time.monotonic() - began


def by_containerd(running: real.Containerd, image: str) -> float:
    """Return the seconds of containerd's pull and unpack, and make it forget the image."""
    began = time.monotonic()
    running.pull(image)
    seconds = time.monotonic() - began
    running.ctr("images", "rm", "--sync", image)
    return seconds


def by_lazyfs(directory: Path, root: Path, image: str) -> float:
    """Return the seconds of `lazyfs mount`, the daemon's start included."""
    began = time.monotonic()
    with lazy_image.mounted(directory, root, image, {}):
        return time.monotonic() - began


def by_running_lazyfs(directory: Path, root: Path, image: str, other: str) -> float:
    """Return the seconds of `lazyfs mount` beside another image's mount, whose daemon runs already."""
    target = directory / "second"
    target.mkdir(exist_ok=True)
    with lazy_image.mounted(directory, root, other, {}):
        began = time.monotonic()
        lazy_image.command(directory, root, {}, "mount", image, str(target))
        seconds = time.monotonic() - began
        lazy_image.command(directory, root, {}, "umount", str(target))
    return seconds


def empty_image(directory: Path, registry: real.DockerRegistry) -> str:
    """Push an image with one empty directory."""
    tar = directory / "empty.tar"
    with tarfile.open(tar, "w") as out:
        member = tarfile.TarInfo("empty")
        member.type = tarfile.DIRTYPE
        out.addfile(member)
    image = registry.image("empty", "1")
    real.copy_image(real.build_layout(directory / "other", "empty", [tar]), image)
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, taken in turn")
    parser.add_argument("--layers", type=int, default=1, help="layers that the tar is cut into")
    parser.add_argument("--compression", choices=sorted(_DECODERS), default="gzip")
    parser.add_argument("--tar", type=Path, default=None, metavar="FILE", help="instead of a minimal Debian")
    args = parser.parse_args()
    tar = args.tar or debian.rootfs_tar()
    times: dict[str, list[float]] = {"lazyfs": [], "lazyfs_cold": [], "containerd": [], "curl_tar": []}
    with (
        scratch() as directory,
        real.docker_registry(directory / "r") as registry,
        real.containerd(directory / "c") as running,
    ):
        image = registry.image("plain", args.compression)
        publish(split(tar, args.layers, directory), args.compression, directory, image)
        other = empty_image(directory, registry)
        digests = [layer["digest"] for layer in manifest_of(image)["layers"]]
        urls = [f"http://{registry.host}/v2/plain/blobs/{digest}" for digest in digests]
        for pair in range(args.pairs):
            drop_caches()
            for url in urls:  # the registry's disk limits nobody
                subprocess.run(["curl", "-sS", "--noproxy", "*", "-o", "/dev/null", url], check=True, timeout=600)
            took = {
                "lazyfs": by_running_lazyfs(directory, directory / f"s{pair}", image, other),
                "lazyfs_cold": by_lazyfs(directory, directory / f"t{pair}", image),
                "curl_tar": by_hand(urls, args.compression, directory / f"x{pair}"),
                "containerd": by_containerd(running, image.removeprefix("docker://")),
            }
            for name, seconds in took.items():
                times[name].append(seconds)
            print(json.dumps({"pair": pair, **{name: round(value, 3) for name, value in took.items()}}), flush=True)
            shutil.rmtree(directory / f"x{pair}")
            for store in (f"s{pair}", f"t{pair}"):
                shutil.rmtree(directory / store)
    medians = {name: statistics.median(values) for name, values in times.items()}
    faster = statistics.median(c / ours for c, ours in zip(times["containerd"], times["lazyfs"], strict=True))
    share = statistics.median(c / ours for c, ours in zip(times["curl_tar"], times["lazyfs"], strict=True))
    summary = {
        "layers": args.layers,
        "compression": args.compression,
        "tar": tar.stat().st_size,
        "medians": {name: round(value, 3) for name, value in medians.items()},
        "times_as_fast_as_containerd": round(faster, 2),
        "speed_of_curl_tar": round(share, 2),
        "machine": machine.facts(),
    }
    print(json.dumps(summary), flush=True)
    return 0 if faster >= FASTER and share >= SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
