"""`lazyfs verify`: every byte of an image held against its digests, without mounting it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.errors import DigestMismatch, FormatError, LazyfsError
from lazyfs.limits import VERIFY_THREADS
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.cli.output import Output
    from lazyfs.cli.verify_layer import Verdict
    from lazyfs.oci import Descriptor
    from lazyfs.registry.repository import Repository

_EPILOG = """\
examples:
  lazyfs verify docker://registry.example:5000/app:1
  lazyfs verify oci:./layout:app
  lazyfs verify --json registry.example:5000/app:1 | jq '.layers[] | select(.ok | not)'

It reads every layer once, side by side, and exits 6 when anything is not what a digest promised."""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "verify",
        description="Check an image without mounting it: manifest and config digests; each layer's blob digest and "
        "diff ID; for lazy layers also the TOC's digest, each chunk's digest, and the TOC against the tar's headers.",
        epilog=_EPILOG,
    )
    common.add_image(parser)
    common.add_usual(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Verify one image. Blocking. Return 0, 6 when a promise was broken, else the code of the first other failure."""
    from lazyfs import reference as references
    from lazyfs.cli.output import count
    from lazyfs.cli.side_by_side import side_by_side
    from lazyfs.registry.resolve import fetch_config, resolve_image

    reference = references.parse(args.image)
    with common.opened(args, reference, common.settings(args)) as repository:
        resolved = resolve_image(repository, reference, common.platform(args))
        config = fetch_config(repository, resolved.manifest)
        out.line(f"manifest  {resolved.manifest.digest}  ok")
        out.line(f"config    {config.digest}  ok")
        layers = resolved.manifest.layers
        works = [_work(repository, *pair, out) for pair in zip(layers, config.diff_ids, strict=True)]
        results = side_by_side(works, min(VERIFY_THREADS, os.cpu_count() or 1))
    errors = [result for result in results if isinstance(result, LazyfsError)]
    size = format_size(sum(layer.size for layer in layers))
    if errors:
        out.line(f"{len(errors)} of {count(len(layers))} not what promised, or not readable")
    else:
        out.line(f"{count(len(layers))}, {size}: everything is what it promises")
    out.json(
        {
            "image": str(reference),
            "digest": resolved.manifest.digest,
            "config": config.digest,
            "ok": not errors,
            "layers": [_layer_json(layer, result) for layer, result in zip(layers, results, strict=True)],
        }
    )
    codes = [exit_codes.code_of(error) for error in errors]
    if exit_codes.VERIFICATION in codes:
        return exit_codes.VERIFICATION
    return codes[0] if codes else exit_codes.OK


def _work(repository: Repository, layer: Descriptor, diff_id: str, out: Output) -> Callable[[], Verdict]:
    def work() -> Verdict:
        from lazyfs.cli.verify_layer import verify_layer
        from lazyfs.registry.mirrored import read_again

        try:
            with out.progress(f"layer {layer.digest[:19]}", layer.size) as bar:
                check = partial(verify_layer, repository, layer, diff_id, bar.advance)
                verdict = read_again(repository, layer.digest, check, (DigestMismatch, FormatError))
        except LazyfsError as error:
            out.line(f"layer     {layer.digest}  WRONG: {error.message}")
            raise
        out.line(f"layer     {layer.digest}  ok ({verdict.form}: {', '.join(verdict.checked)})")
        return verdict

    return work


def _layer_json(layer: Descriptor, result: Verdict | LazyfsError) -> dict[str, Any]:
    out: dict[str, Any] = {"digest": layer.digest, "size": layer.size, "ok": not isinstance(result, LazyfsError)}
    if isinstance(result, LazyfsError):
        return {**out, "error": {"class": type(result).__name__, "message": result.message, "hint": result.hint}}
    out |= {"form": result.form, "checked": list(result.checked)}
    return out if result.entries < 0 else {**out, "entries": result.entries}
