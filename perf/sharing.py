"""Images that share their base: one merged erofs mount an image, or one a layer with an overlay of them an image?

    python -m perf.sharing [--images 10] [--bases 4] [--rounds 3]

The devices are plain files on disk on both sides, so that only the shape of the mounts differs. Prints one JSON line a
round and one with the medians and ratios. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lazyfs.format.erofs_write import device_layers, write_erofs
from lazyfs.format.table import LayerTable
from lazyfs.mount import erofs_mount
from lazyfs.tree import Tree, build_tree
from perf import debian, lazy_image, machine
from perf.fifty import own_layer
from perf.memory import walk
from perf.resident import regular_files
from perf.start import drop_caches, scratch
from tests.helpers.erofs_images import KEY, unpacked

_NAMES = {"Cached": "cached", "Slab": "slab"}  # of /proc/meminfo


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers with their tables, data spaces and an erofs image each, base first."""

    tables: list[LayerTable]
    spaces: list[Path]
    images: list[Path]


def split(tar: Path, directory: Path, count: int) -> list[Path]:
    """Write `count` tars that together have what `tar` has, one part of its members each."""
    targets = [directory / f"base-{number}.tar" for number in range(count)]
    with ExitStack() as stack:
        source = stack.enter_context(tarfile.open(tar))
        outs = [stack.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT)) for path in targets]
        links = []
        members = [member for member in source if not member.name.startswith("./dev/")]
        for number, member in enumerate(members):
            if member.isdir():
                for out in outs:  # as layers of an image do, which name the directories of what they have
                    out.addfile(member)
            elif member.islnk():
                links.append(member)
            else:
                content = source.extractfile(member) if member.isreg() else None
                outs[number * count // len(members)].addfile(member, content)
        for member in links:  # as a file, for its target may be in another layer
            target = source.getmember(member.linkname)
            copy = target.replace(name=member.name, deep=False)
            outs[-1].addfile(copy, source.extractfile(target))
    return targets


def make_layers(directory: Path, tars: list[Path]) -> Layers:
    """Make what a mount a layer needs."""
    tables, spaces = unpacked(directory, *(tar.read_bytes() for tar in tars))
    images = [make_image(directory, f"layer-{number}", [table]) for number, table in enumerate(tables)]
    return Layers(tables, spaces, images)


def make_image(directory: Path, name: str, tables: list[LayerTable]) -> Path:
    """Write the image of a chain of layers."""
    build_tree(directory / f"{name}-tree", tables)
    tree = Tree(directory / f"{name}-tree")
    write_erofs(directory / name, tree, tables, KEY)
    tree.close()
    return directory / name


def _mount(image: Path, layers: Layers, chain: list[int], target: Path, stack: ExitStack) -> None:
    used = device_layers([layers.tables[number] for number in chain])
    target.mkdir(parents=True, exist_ok=True)
    devices = [layers.spaces[chain[place]] for place in used]
    erofs_mount.mount(image, devices, target, erofs_mount.Method.FILES)
    stack.callback(erofs_mount.unmount, target)


def merged(layers: Layers, chains: list[list[int]], images: list[Path], place: Path, stack: ExitStack) -> list[Path]:
    """Show each image by one mount, and an overlay over it as a container has it."""
    shown = []
    for number, (chain, image) in enumerate(zip(chains, images, strict=True)):
        _mount(image, layers, chain, place / f"image-{number}", stack)
        over = lazy_image.overlay(place / f"image-{number}", place / f"over-{number}")
        shown.append(stack.enter_context(over))
    return shown


def stacked(layers: Layers, chains: list[list[int]], place: Path, stack: ExitStack) -> list[Path]:
    """Show each layer by one mount, and each image by an overlay over those of its layers."""
    for number in sorted({number for chain in chains for number in chain}):
        _mount(layers.images[number], layers, [number], place / f"layer-{number}", stack)
    shown = []
    for number, chain in enumerate(chains):
        lower = ":".join(str(place / f"layer-{layer}") for layer in reversed(chain))
        shown.append(stack.enter_context(lazy_image.overlay(lower, place / f"over-{number}")))
    return shown


def meminfo() -> dict[str, int]:
    """Return bytes of the page cache and of the kernel's own objects."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {short: int(lines[name].split()[0]) * 1024 for name, short in _NAMES.items()}


def measure(show: Callable[[ExitStack], list[Path]]) -> dict[str, float]:
    """Return the seconds of mounts, walks and reads of all images, and the memory that is taken by walks and reads."""
    with ExitStack() as stack:
        drop_caches()
        start = meminfo()
        began = time.monotonic()
        roots = show(stack)
        mounted = time.monotonic() - began
        cold = sum(walk(root)[1] for root in roots)
        walked = meminfo()
        warm = sum(walk(root)[1] for root in roots)
        first = _read(roots[:1])
        others = _read(roots[1:])
        read = meminfo()
        again = _read(roots)
    return {
        "mount_s": mounted,
        "first_walk_s": cold,
        "warm_walk_s": warm,
        "read_of_first_image_s": first,
        "read_of_others_s": others,
        "read_again_s": again,
        **{f"{name}_walked": walked[name] - start[name] for name in start},
        **{f"{name}_read": read[name] - start[name] for name in start},
    }


def _read(roots: list[Path]) -> float:
    """Return the seconds of reading the programs and libraries of images."""
    files = [path for root in roots for path in regular_files(root / "usr/bin") + regular_files(root / "usr/lib")]
    began = time.monotonic()
    for path in files:
        with path.open("rb", buffering=0) as handle:
            while handle.read(1 << 20):
                pass
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description="A merged mount an image beside a mount a layer.")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--bases", type=int, default=4, help="layers that all images share")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sides: dict[str, list[dict[str, float]]] = {"merged": [], "stacked": []}
    with scratch() as directory:
        tars = split(debian.rootfs_tar(), directory, args.bases)
        for number in range(args.images):
            own_layer(directory / f"own-{number}.tar", number)
            tars.append(directory / f"own-{number}.tar")
        layers = make_layers(directory, tars)
        chains = [[*range(args.bases), args.bases + number] for number in range(args.images)]
        images = [
            make_image(directory, f"image-{number}", [layers.tables[layer] for layer in chain])
            for number, chain in enumerate(chains)
        ]
        shapes: dict[str, Callable[[ExitStack], list[Path]]] = {
            "merged": lambda stack: merged(layers, chains, images, directory / "m", stack),
            "stacked": lambda stack: stacked(layers, chains, directory / "l", stack),
        }
        for number in range(args.rounds):
            for side in sorted(sides, reverse=number % 2 == 1):
                sides[side].append(measure(shapes[side]))
            line = {side: {name: round(value, 4) for name, value in found[-1].items()} for side, found in sides.items()}
            print(json.dumps({"what": "sharing", "round": number, **line}), flush=True)
    middle = {
        side: {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}
        for side, found in sides.items()
    }
    theirs = middle["stacked"]
    ratios = {name: round(value / theirs[name], 3) for name, value in middle["merged"].items() if theirs[name]}
    summary = {"what": "sharing, medians", "images": args.images, "bases": args.bases, **middle}
    print(json.dumps({**summary, "merged_by_stacked": ratios, **machine.facts()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
