"""`lazyfs convert`: make an image startable at once."""

from __future__ import annotations

import argparse
import gc
import os
from typing import TYPE_CHECKING

from lazyfs.cli import common
from lazyfs.errors import UsageError
from lazyfs.limits import BLOB_TIMEOUT
from lazyfs.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from indexer.report import ConvertReport, LayerReport
    from lazyfs.cli.output import Output
    from lazyfs.cli.report_file import ReportFile
    from lazyfs.reference import Reference
    from lazyfs.registry.open import OpenOptions
    from lazyfs.registry.repository import Repository


_DESCRIPTION = """\
Convert the layers of SRC to a form that starts lazily and push the image to DST. The converted image still pulls and
runs anywhere: zstd-chunked and podman's form keep the layers' diff IDs, estargz is for runtimes that know gzip only.

Layers in that form already are kept, and layers converted before are reused, from DST, the work directory or the cache
repository. Nothing is pushed before every byte that is to be pushed was verified. A conversion that was interrupted
goes on where it was."""

_EPILOG = """\
examples:
  lazyfs convert docker://registry.example:5000/app:1 docker://registry.example:5000/app:1-lazy
  lazyfs convert oci:./layout:app oci:./layout:app-lazy
  lazyfs convert --platform linux/arm64 debian:12 registry.example:5000/debian:12-lazy
  lazyfs convert --all-platforms --copy-referrers --report report.json app:1 registry.example:5000/app:1-lazy
  lazyfs convert --format estargz --docker registry.example:5000/app:1 registry.example:5000/app:1-esgz
  lazyfs convert --cache-repo registry.example:5000/lazyfs-cache app:1 registry.example:5000/app:1-lazy
  lazyfs convert --level 12 --jobs 4 --json oci:./app registry.example:5000/app:lazy"""


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
        "--level", metavar="N", type=_level, help="1 to 22 (default: 3, for podman 6), estargz 1 to 9 (default: 6)"
    )
    parser.add_argument("--prefetch", metavar="FILE", help="what a start reads, in order: a trace, or a path a line")
    parser.add_argument("--jobs", metavar="N", type=_jobs, help="layers and threads at once (default: CPU cores)")
    which = parser.add_mutually_exclusive_group()
    common.add_platform(which)
    which.add_argument(
        "--all-platforms", action="store_true", help="the whole index, with the attestations and the like in it"
    )
    parser.add_argument("--docker", action="store_true", help="leave an image of Docker's media types one (estargz)")
    parser.add_argument(
        "--copy-referrers", action="store_true", help="copy SBOMs and the like that refer to SRC; never signatures"
    )
    parser.add_argument("--force", action="store_true", help="convert layers anew that could be kept or reused")
    parser.add_argument(
        "--cache-repo", metavar="REPO", help="a repository that remembers converted layers for all who convert"
    )
    parser.add_argument(
        "--work-dir", metavar="DIR", help="where unfinished work is kept (default: ~/.cache/lazyfs/convert)"
    )
    parser.add_argument("--report", metavar="FILE", help="write a JSON report, also when the conversion fails")
    common.add_registry(parser, "src", "dest")
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Convert and push. Blocking. Raise LazyfsError; temporary files are gone then, too."""
    from contextlib import ExitStack

    from lazyfs.cli.report_file import ReportFile

    # A layer's names are many small objects and no cycles; looking for some again and again costs several percent.
    gc.disable()
    report_file = None if args.report is None else ReportFile(args.report, args.source, args.destination)
    with ExitStack() as reporting:
        if report_file is not None:
            reporting.enter_context(report_file.on_failure())
        report = _convert(args, out, report_file)
    if report_file is not None:
        report_file.write(report.to_json())
    _say(report, out)
    return 0


def _convert(args: argparse.Namespace, out: Output, report_file: ReportFile | None) -> ConvertReport:
    from contextlib import ExitStack
    from dataclasses import replace
    from pathlib import Path

    from indexer.image import Conversion
    from indexer.options import ConvertOptions, OutputForm
    from indexer.prefetch import read_prefetch
    from lazyfs import reference
    from lazyfs.registry.local.open_local import check_destination
    from lazyfs.registry.open import open_repository

    source_reference = reference.parse(args.source)
    destination_reference = reference.parse(args.destination)
    check_destination(destination_reference)
    if args.copy_referrers and destination_reference.transport == "containerd":
        raise UsageError("containerd keeps no referrers, so --copy-referrers has no place for them")
    cache_reference = reference.parse(args.cache_repo) if args.cache_repo is not None else None
    if cache_reference is not None and (cache_reference.digest or cache_reference.tag not in ("", "latest")):
        raise UsageError("--cache-repo takes a repository, not an image", hint="leave out the tag")
    options = ConvertOptions(
        platform=args.platform,
        form=OutputForm(args.compat or args.format),
        level=args.level,
        prefetch=read_prefetch(Path(args.prefetch)) if args.prefetch is not None else (),
        jobs=args.jobs or len(os.sched_getaffinity(0)),
        force=args.force,
        all_platforms=args.all_platforms,
        docker=args.docker,
        copy_referrers=args.copy_referrers,
        work=_work_directory(args.work_dir, out),
        progress=out.progress,
    )
    options.check()
    settings = common.settings(args)
    source_options = replace(common.open_options(args, settings, side="src"), total_timeout=BLOB_TIMEOUT)
    destination_options = replace(common.open_options(args, settings, side="dest"), total_timeout=BLOB_TIMEOUT)
    with ExitStack() as opened:

        def repository(where: Reference, how: OpenOptions) -> Repository:
            found = open_repository(where, how)
            opened.callback(found.close)
            return found

        conversion = Conversion(
            repository(source_reference, source_options),
            source_reference,
            repository(destination_reference, destination_options),
            destination_reference,
            options,
            repository(cache_reference, destination_options) if cache_reference else None,
        )
        if report_file is not None:
            report_file.conversion = conversion
        return conversion.run()


def _say(report: ConvertReport, out: Output) -> None:
    out.json(report.to_json())
    for image in report.images:
        if len(report.images) > 1:
            out.line(f"{image.platform}  {image.manifest_digest}")
        for layer in image.layers:
            out.line(_layer_line(layer))
    for note in report.notes:
        out.note(note)
    out.line(
        f"{report.destination}  {report.manifest_digest}  {format_size(report.source_size)} → "
        f"{format_size(report.size)}, {format_size(report.pushed)} pushed, {report.seconds:.1f} s"
    )


def _layer_line(layer: LayerReport) -> str:
    said = f"  {layer.entries} entries" if layer.entries >= 0 else ""
    if layer.origin is not None:
        said += f"  from the {layer.origin.value}"
    if not layer.diff_id_kept:
        said += "  new diff ID" + (f" ({'; '.join(layer.notes)})" if layer.notes else "")
    return (
        f"{layer.source_digest[7:19]} → {layer.digest[7:19]}  {layer.action.value:<9}  "
        f"{format_size(layer.source_size)} → {format_size(layer.size)}{said}"
    )


def _work_directory(named: str | None, out: Output) -> Path | None:
    """Return the work directory; None, with a remark, when the usual one can't be had."""
    from pathlib import Path

    if named == "":
        raise UsageError("--work-dir '' names no directory")
    if named is not None:
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache) / "lazyfs" / "convert"
    try:
        if not path.is_absolute():
            raise FileNotFoundError
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.geteuid() or not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError
    except OSError:
        out.note(f"{path} can't be written, so an interrupted conversion starts from the beginning (--work-dir)")
        return None
    return path


def _level(text: str) -> int:
    return _number(text, 22, "compression level")


def _jobs(text: str) -> int:
    return _number(text, 1024, "number of jobs")


def _number(text: str, largest: int, what: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= largest:
        raise UsageError(f"{text!r} is no {what}", hint=f"1 to {largest}")
    return int(text)
