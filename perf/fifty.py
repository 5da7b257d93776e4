"""How much memory does a daemon take with fifty images mounted and read at once?

    python -m perf.fifty [--images 50] [--driver erofs]

Prints one JSON line. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from pathlib import Path

from perf import debian, lazy_image, machine
from perf.memory import anonymous, daemon_of
from perf.start import scratch
from tests.helpers import real

GOAL = 150_000_000  # anonymous bytes
_FILES = 40  # of an image's own layer
_SIZE = 16_000  # bytes of each, about


def own_layer(path: Path, number: int) -> None:
    """Write the tar of a layer that no other image has."""
    source = random.Random(number)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in range(_FILES):
            member = tarfile.TarInfo(f"srv/app-{number}/file-{name:03}")
            content = source.randbytes(_SIZE // 2).hex().encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read_own(tree: Path, number: int) -> int:
    """Read an image's own files, and a few hundred kB of the base; return the bytes."""
    own = sorted((tree / f"srv/app-{number}").iterdir())
    shared = sorted(path for path in (tree / "etc").rglob("*") if path.is_file() and not path.is_symlink())
    return sum(len(path.read_bytes()) for path in [*own, *shared])


def make_images(directory: Path, registry: real.DockerRegistry, count: int) -> list[str]:
    """Push images of a Debian system and one layer of their own each; return their references."""
    layout = directory / "plain"
    real.build_layout(layout, "base", [debian.rootfs_tar()])
    references = []
    for number in range(count):
        own_layer(directory / "own.tar", number)
        real.call("umoci", "tag", "--image", f"{layout}:base", str(number))
        real.call("umoci", "raw", "add-layer", "--image", f"{layout}:{number}", directory / "own.tar")
        source = f"oci:{layout}:{number}"
        references.append(registry.image(f"fifty-{number}", "lazy"))
        lazy = f"oci:{directory / 'lazy'}:{number}"
        lazy_image.command(directory, directory / "convert", {}, "convert", source, lazy)
        real.copy_image(lazy, references[-1])
    return references


def main() -> int:
    parser = argparse.ArgumentParser(description="The daemon's memory with many images mounted and read.")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--driver", choices=("erofs", "fuse"), default="erofs")
    args = parser.parse_args()
    settings = lazy_image.ONLY_DEMAND | {"LAZYFS_DRIVER": args.driver, "LAZYFS_DAEMON_LINGER": "20"}
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        references = make_images(directory, registry, args.images)
        root, memory, read = directory / "s", [], 0
        for number, reference in enumerate(references):
            tree = directory / f"tree-{number}"
            tree.mkdir()
            lazy_image.command(directory, root, settings, "mount", reference, str(tree))
            if number == 0:
                pid = daemon_of(directory, root)
            memory.append(anonymous(pid))
        mounted = anonymous(pid)
        for number in range(args.images):
            read += read_own(directory / f"tree-{number}", number)
        after = anonymous(pid)
        drivers = sorted({mount["driver"] for mount in lazy_image.status(directory, root)["mounts"]})
        for number in range(args.images):
            lazy_image.command(directory, root, settings, "umount", str(directory / f"tree-{number}"))
    summary = {
        "what": "fifty images",
        "drivers": drivers,
        "images": args.images,
        "anonymous_one_mounted": memory[0],
        "anonymous_mounted": mounted,
        "anonymous_read": after,
        "bytes_read": read,
    }
    print(json.dumps({**summary, **machine.facts()}))
    return 1 if after > GOAL else 0


if __name__ == "__main__":
    raise SystemExit(main())
