"""`lazyfs convert`: make an image startable at once."""

from __future__ import annotations

import argparse
import gc
import os
from typing import TYPE_CHECKING

from lazyfs.cli import common
from lazyfs.errors import UsageError
from lazyfs.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from indexer.report import ConvertReport
    from lazyfs.cli.output import Output
    from lazyfs.reference import Reference

_PUSH_TIMEOUT = 6 * 3600.0  # seconds for one upload or document; a stalled server is noticed long before

_DESCRIPTION = """\
Convert the layers of SRC to zstd:chunked and push the image to DST. The converted image still pulls and runs anywhere
that takes OCI images with zstd layers; its config, and so its layers' diff IDs, stay the same.

Layers that are in that form already are kept, and layers converted before to DST are reused. Nothing is pushed before
every byte of SRC was verified."""

_EPILOG = """\
examples:
  lazyfs convert docker://registry.example:5000/app:1 docker://registry.example:5000/app:1-lazy
  lazyfs convert oci:./layout:app oci:./layout:app-lazy
  lazyfs convert --platform linux/arm64 debian:12 registry.example:5000/debian:12-lazy
  lazyfs convert --level 12 --jobs 4 --json oci:./app registry.example:5000/app:lazy

DST is written to a temporary directory first: beside it for oci:DIR, else in $TMPDIR."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command with its arguments."""
    parser = subparsers.add_parser(
        "convert", usage="lazyfs convert [options] SRC DST", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("source", metavar="SRC", help=common.IMAGE_HELP)
    parser.add_argument("destination", metavar="DST", help="where the converted image goes; a tag, not a digest")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--format", choices=("zstd-chunked", "estargz"), default="zstd-chunked", help="the layers' form (zstd-chunked)"
    )
    form.add_argument("--compat", choices=("podman",), help="podman: the zstd:chunked that podman pulls in parts")
    parser.add_argument(
        "--level", metavar="N", type=_level, help="compression level: 1 to 22 (default: 3), estargz 1 to 9 (default: 6)"
    )
    parser.add_argument("--prefetch", metavar="FILE", help="a file of paths that a start reads, one a line, in order")
    parser.add_argument("--jobs", metavar="N", type=_jobs, help="layers and threads at once (default: CPU cores)")
    common.add_platform(parser)
    common.add_registry(parser, "src", "dest")
    parser.add_argument("--force", action="store_true", help="convert layers anew that could be kept or reused")
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Convert and push. Blocking. Raise LazyfsError; temporary files are gone then, too."""
    from dataclasses import replace
    from pathlib import Path

    from indexer.image import convert_image
    from indexer.options import ConvertOptions, OutputForm
    from indexer.prefetch import read_prefetch
    from lazyfs import reference
    from lazyfs.registry.open import open_repository

    # A layer's names are many small objects and no cycles; looking for some again and again costs several percent.
    gc.disable()
    source_reference = reference.parse(args.source)
    destination_reference = reference.parse(args.destination)
    options = ConvertOptions(
        platform=args.platform,
        form=OutputForm(args.compat or args.format),
        level=args.level,
        prefetch=read_prefetch(Path(args.prefetch)) if args.prefetch else (),
        jobs=args.jobs or len(os.sched_getaffinity(0)),
        force=args.force,
        scratch=_scratch(destination_reference),
        progress=out.progress,
    )
    settings = common.settings(args)
    source_options = replace(common.open_options(args, settings, side="src"), total_timeout=_PUSH_TIMEOUT)
    destination_options = replace(common.open_options(args, settings, side="dest"), total_timeout=_PUSH_TIMEOUT)
    source = open_repository(source_reference, source_options)
    destination = open_repository(destination_reference, destination_options)
    try:
        report = convert_image(source, source_reference, destination, destination_reference, options)
    finally:
        source.close()
        destination.close()
    _say(report, out)
    return 0


def _say(report: ConvertReport, out: Output) -> None:
    out.json(report.to_json())
    for layer in report.layers:
        entries = f"  {layer.entries} entries" if layer.entries >= 0 else ""
        changed = "" if layer.diff_id_kept else "  new diff ID (sparse files expanded)"
        out.line(
            f"{layer.source_digest[7:19]} → {layer.digest[7:19]}  {layer.action.value:<9}  "
            f"{format_size(layer.source_size)} → {format_size(layer.size)}{entries}{changed}"
        )
    out.line(
        f"{report.destination}  {report.manifest_digest}  {format_size(report.source_size)} → "
        f"{format_size(report.size)}, {format_size(report.pushed)} pushed, {report.seconds:.1f} s"
    )


def _scratch(destination: Reference) -> Path | None:
    """Return where the blobs of an OCI layout are made: on its own file system, so that moving them costs nothing."""
    from pathlib import Path

    if destination.transport != "oci":
        return None
    layout = Path(destination.path).absolute()
    return layout if layout.is_dir() else layout.parent


def _level(text: str) -> int:
    return _number(text, 22, "compression level")


def _jobs(text: str) -> int:
    return _number(text, 1024, "number of jobs")


def _number(text: str, largest: int, what: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= largest:
        raise UsageError(f"{text!r} is no {what}", hint=f"1 to {largest}")
    return int(text)
