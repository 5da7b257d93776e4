"""lazyfs pull: an image into containerd, lazily where its snapshotter can."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common
from lazyfs.cli.output import Output, count
from lazyfs.errors import UsageError
from lazyfs.limits import BLOB_TIMEOUT
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.cli.pull_image import PulledImage
    from lazyfs.reference import Reference

_JOBS = 3
_SNAPSHOTTER = "lazyfs"

_DESCRIPTION = """\
Pull an image into containerd through containerd's own API, telling its snapshotter which image and layer each snapshot
is for. A lazy snapshotter then needs no download; layers that it does not take, and those of any other snapshotter, are
downloaded and unpacked as by `ctr images pull`."""

_EPILOG = """\
examples:
  lazyfs pull registry.example:5000/app:1
  lazyfs pull --namespace k8s.io docker.io/library/nginx:1
  lazyfs pull --address /run/k3s/containerd/containerd.sock --snapshotter overlayfs debian:12
  ctr run --rm --snapshotter lazyfs registry.example:5000/app:1 one

A pull that was interrupted goes on where it was. The image's blobs are not in containerd's content store afterwards:
`lazyfs fetch --content IMAGE` gets them, for push, export, save and commit.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("pull", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("image", metavar="IMAGE", help="docker://HOST/REPO:TAG, HOST/REPO:TAG, HOST/REPO@sha256:…")
    add_containerd(parser)
    parser.add_argument(
        "--snapshotter", metavar="NAME", default=_SNAPSHOTTER, help=f"of containerd's (default {_SNAPSHOTTER})"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=_JOBS, help=f"layers downloaded at a time (default {_JOBS})"
    )  # fmt: skip
    common.add_usual(parser)
    parser.set_defaults(run=run)


def add_containerd(parser: argparse.ArgumentParser) -> None:
    """Add --address and --namespace, short for --containerd-address and --containerd-namespace."""
    parser.add_argument(
        "--address", dest="containerd_address", metavar="SOCKET", help="containerd's; or $CONTAINERD_ADDRESS"
    )
    parser.add_argument(
        "--namespace", dest="containerd_namespace", metavar="NAME", help="containerd's; or $CONTAINERD_NAMESPACE"
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Pull. Blocking. Return the exit code; raise LazyfsError."""
    from contextlib import closing
    from dataclasses import replace

    from lazyfs.containerd.address import namespace_name, socket_path
    from lazyfs.containerd.client import check_packages, connect
    from lazyfs.registry.open import open_repository

    if args.jobs < 1:
        raise UsageError("--jobs is at least 1")
    if not args.snapshotter:
        raise UsageError("--snapshotter '' names no snapshotter")
    reference = _reference(args.image)
    settings = common.settings(args)
    options = common.open_options(args, settings)
    namespace = namespace_name(args.containerd_namespace or "")
    check_packages()
    from lazyfs.cli.pull_image import ImagePull

    with (
        closing(connect(socket_path(args.containerd_address or ""), namespace)) as client,
        closing(open_repository(reference, replace(options, total_timeout=BLOB_TIMEOUT))) as repository,
    ):
        pulled = ImagePull(
            client,
            client.snapshots(args.snapshotter),
            repository,
            reference,
            platform=common.platform(args),
            jobs=args.jobs,
            progress=out.progress,
        ).run()
    _say(pulled, namespace, args.snapshotter, out)
    return 0


def _reference(image: str) -> Reference:
    from lazyfs import reference

    parsed = reference.parse(image)
    if parsed.transport == "containerd":
        raise UsageError(f"{image} is in containerd already", hint="name it as its registry does: HOST/REPO:TAG")
    if parsed.transport != "docker":
        raise UsageError(
            f"{image} is in no registry, and containerd pulls from registries",
            hint=f"import it: `lazyfs convert {image} containerd:NAME`, or `ctr images import`",
        )
    return parsed


def _say(pulled: PulledImage, namespace: str, snapshotter: str, out: Output) -> None:
    from lazyfs.cli.pull_image import How

    out.json({**pulled.to_json(), "namespace": namespace, "snapshotter": snapshotter})
    for layer in pulled.layers:
        size = format_size(layer.size)
        out.line(f"{layer.digest[7:19]}  {layer.how.value:<10}  {size:>10}  {layer.seconds:.2f} s")
    if snapshotter == _SNAPSHOTTER and any(layer.how in (How.DOWNLOADED, How.UNPACKED) for layer in pulled.layers):
        out.note(f"not every layer is lazy: `lazyfs why {pulled.name}` says why")
    ways = [layer.how.value for layer in pulled.layers]
    parts = ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))
    fetched = format_size(sum(layer.fetched for layer in pulled.layers))
    whole = format_size(sum(layer.size for layer in pulled.layers))
    out.line(
        f"{pulled.name} is in containerd (namespace {namespace}, snapshotter {snapshotter}): {count(len(ways))}"
        f"{f' ({parts})' if parts else ''}, {fetched} of {whole} downloaded, "
        f"{pulled.seconds:.1f} s"
    )
