"""`lazyfs inspect`: what an image is made of, which layers can be lazy and why not, and what finding out costs."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.cli.output import Output
    from lazyfs.format.lazy import TocSource
    from lazyfs.oci import Descriptor, ImageConfig, Index, Manifest
    from lazyfs.reference import Reference
    from lazyfs.registry.hops import Hop
    from lazyfs.registry.repository import Repository

_EPILOG = """\
examples:
  lazyfs inspect docker://registry.example:5000/app:1
  lazyfs inspect --files oci:./layout:app               with the number of files in each layer
  lazyfs inspect --timing registry.example:5000/app:1   each request that a mount makes, and what it took
  lazyfs inspect --json registry.example:5000/app:1 | jq '.layers[] | select(.lazy | not) | .reason'"""

_THREADS = 16  # tables of contents fetched at once; a registry's connection pool has as many


@dataclass(slots=True)
class _Layer:
    """What is known of one layer. `entries` and `toc_size` (bytes of the document) only when its TOC was fetched."""

    descriptor: Descriptor
    diff_id: str
    form: str
    lazy: bool
    reason: str
    toc: TocSource | None = None
    entries: int = -1
    toc_size: int = -1
    problem: Exception | None = None

    def to_json(self) -> dict[str, Any]:
        out = {
            "digest": self.descriptor.digest,
            "size": self.descriptor.size,
            "media_type": self.descriptor.media_type,
            "diff_id": self.diff_id,
            "form": self.form,
            "lazy": self.lazy,
            "reason": self.reason,
        }
        return out if self.entries < 0 else {**out, "entries": self.entries, "toc_size": self.toc_size}


@dataclass(slots=True)
class _Recorder:
    """Collects requests, and which piece of work each belongs to; called from all threads."""

    hops: list[tuple[int, Hop]] = field(default_factory=list)
    work: threading.local = field(default_factory=threading.local)

    def __call__(self, hop: Hop) -> None:
        self.hops.append((getattr(self.work, "number", -1), hop))  # append is atomic

    def sequential(self) -> int:
        """Return the round trips in sequence: all before the parallel part, and of that its longest piece of work."""
        pieces: dict[int, int] = {}
        for number, _ in self.hops:
            pieces[number] = pieces.get(number, 0) + 1
        before = pieces.pop(-1, 0)
        waves = -(-len(pieces) // _THREADS)
        return before + max(pieces.values(), default=0) * waves


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "inspect",
        description="Show an image's digest, platforms, size, config and layers, and which layers can be lazy. Reads "
        "documents only: manifest, config and, with --files or --timing, tables of contents.",
        epilog=_EPILOG,
    )
    common.add_image(parser)
    common.add_usual(parser)
    parser.add_argument("--layers", action="store_true", help="whole digests, diff IDs and media types of the layers")
    parser.add_argument("--files", action="store_true", help="fetch the tables of contents and count their entries")
    parser.add_argument("--timing", action="store_true", help="list each request, as a mount makes them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Inspect one image. Blocking. Return 0, or the code of the first TOC that is not what was promised."""
    from lazyfs import reference as references
    from lazyfs.registry.resolve import fetch_config, resolve_image

    reference = references.parse(args.image)
    settings = common.settings(args)
    recorder = _Recorder()
    started = time.monotonic()
    with common.opened(args, reference, settings, recorder) as repository:
        resolved = resolve_image(repository, reference, common.platform(args))
        layers = [_classify(layer, settings.allow_unverified) for layer in resolved.manifest.layers]
        config = _fetch_rest(
            repository, layers, recorder, lambda: fetch_config(repository, resolved.manifest),
            with_tocs=args.files or args.timing, with_footers=args.files,
        )  # fmt: skip
    seconds = time.monotonic() - started
    for layer, diff_id in zip(layers, config.diff_ids, strict=True):
        layer.diff_id = diff_id
    facts = _facts(reference, resolved.manifest, resolved.index, config, layers)
    _print(facts, layers, args.layers, out)
    if args.timing:
        _print_timing(recorder, seconds, out)
        facts["requests"] = [_hop_json(hop, started) for _, hop in recorder.hops]
        facts["sequential"] = recorder.sequential()
        facts["seconds"] = round(seconds, 6)
    out.json(facts)
    problems = [layer.problem for layer in layers if layer.problem is not None]
    return exit_codes.code_of(problems[0]) if problems else exit_codes.OK


def _classify(descriptor: Descriptor, allow_unverified: bool) -> _Layer:
    from lazyfs.format.lazy import NotLazy, toc_source

    source = toc_source(descriptor, allow_unverified=allow_unverified)
    if isinstance(source, NotLazy):
        return _Layer(descriptor, "", plain_form(descriptor), False, source.reason)
    return _Layer(descriptor, "", source.form.value, True, "", source)


def plain_form(descriptor: Descriptor) -> str:
    """Return the compression that a layer's media type claims: "tar+gzip", "tar+zstd" or "tar"."""
    media_type = descriptor.media_type
    if media_type.endswith(("+gzip", ".gzip")):
        return "tar+gzip"
    return "tar+zstd" if media_type.endswith("+zstd") else "tar"


def _fetch_rest(
    repository: Repository,
    layers: list[_Layer],
    recorder: _Recorder,
    get_config: Callable[[], ImageConfig],
    *,
    with_tocs: bool,
    with_footers: bool,
) -> ImageConfig:
    """Fetch the config and, if wanted, all tables of contents at the same time, as a mount does."""
    from lazyfs.cli.side_by_side import side_by_side
    from lazyfs.errors import FooterInvalid

    configs: list[ImageConfig] = []

    def config_work() -> None:
        recorder.work.number = len(layers)
        configs.append(get_config())

    def toc_work(number: int) -> Callable[[], None]:
        def work() -> None:
            recorder.work.number = number
            _look(repository, layers[number])

        return work

    works: list[Callable[[], None]] = [config_work]
    looked = [
        number
        for number, layer in enumerate(layers)
        if (with_tocs and layer.lazy) or (with_footers and _may_have_footer(layer))
    ]
    works += [toc_work(number) for number in looked]
    config_error, *errors = side_by_side(works, _THREADS)
    if config_error is not None:
        raise config_error
    for number, error in zip(looked, errors, strict=True):
        if error is not None:
            layer = layers[number]
            layer.lazy, layer.reason = False, error.message
            if layer.toc is None or layer.toc.verified or not isinstance(error, FooterInvalid):
                layer.problem = error  # without a promise that there is a TOC, its absence is no fault
    return configs[0]


def _may_have_footer(layer: _Layer) -> bool:
    """Whether a layer that can't be lazy may be one of the forms that are refused for a reason of their own."""
    from lazyfs.oci import DOCKER_LAYER_GZIP, OCI_LAYER_GZIP

    return not layer.lazy and layer.descriptor.media_type in (OCI_LAYER_GZIP, DOCKER_LAYER_GZIP)


def _look(repository: Repository, layer: _Layer) -> None:
    """Fetch a layer's table of contents and count its entries, or its footer and tell why it has none to count."""
    from lazyfs.format.footer import MAX_FOOTER
    from lazyfs.format.lazy import NotLazy, read_toc, refusal
    from lazyfs.format.toc import parse_toc

    fetch = partial(common.fetch_bytes, repository, layer.descriptor.digest)
    if layer.toc is None:
        size = min(layer.descriptor.size, MAX_FOOTER)
        last = fetch(layer.descriptor.size - size, size) if size else b""
        layer.reason = refusal(last, layer.descriptor.size) or layer.reason
        return
    toc = read_toc(layer.toc, fetch)
    if isinstance(toc, NotLazy):
        layer.lazy, layer.form, layer.reason = False, plain_form(layer.descriptor), toc.reason
        return
    layer.form = toc.form.value
    layer.toc_size = len(toc.raw)
    layer.entries = sum(1 for _ in parse_toc(toc.raw, toc.payload_end))


def _facts(
    reference: Reference, manifest: Manifest, index: Index | None, config: ImageConfig, layers: list[_Layer]
) -> dict[str, Any]:
    process = config.process
    return {
        "image": str(reference),
        "digest": manifest.digest,
        "media_type": manifest.media_type,
        "index": None if index is None else {"digest": index.digest, "platforms": platforms(index)},
        "platform": "/".join(filter(None, (config.os, config.architecture, config.variant))),
        "size": sum(layer.descriptor.size for layer in layers),
        "lazy": all(layer.lazy for layer in layers),
        "config": {
            "digest": config.digest,
            "created": _text(config.document.get("created")),
            "user": _text(process.get("User")),
            "workdir": _text(process.get("WorkingDir")),
            "entrypoint": _words(process.get("Entrypoint")),
            "cmd": _words(process.get("Cmd")),
            "env": _words(process.get("Env")),
            "ports": sorted(_words(process.get("ExposedPorts"))),
            "volumes": sorted(_words(process.get("Volumes"))),
            "stop_signal": _text(process.get("StopSignal")),
            "labels": process.get("Labels") or {},
        },
        "layers": [layer.to_json() for layer in layers],
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _words(value: object) -> list[str]:
    """Return a list's strings or an object's keys; whoever wrote the config may have put anything there."""
    return [word for word in value if isinstance(word, str)] if isinstance(value, list | dict) else []


def platforms(index: Index) -> list[str]:
    """Return the platforms of an index in its order, attestations left out."""
    found = []
    for entry in index.manifests:
        words = (entry.platform.get("os"), entry.platform.get("architecture"), entry.platform.get("variant"))
        name = "/".join(word for word in words if word)
        if name and not name.startswith("unknown"):
            found.append(name)
    return found


def _print(facts: dict[str, Any], layers: list[_Layer], whole: bool, out: Output) -> None:
    from lazyfs.cli.output import count

    def row(name: str, value: object) -> None:
        out.line(f"{name:<11} {value}")

    row("image", facts["image"])
    row("digest", facts["digest"])
    if facts["index"]:
        row("index", f"{facts['index']['digest']} of {', '.join(facts['index']['platforms']) or 'unnamed platforms'}")
    row("platform", facts["platform"])
    lazy = sum(layer.lazy for layer in layers)
    row("size", f"{format_size(facts['size'])} in {count(len(layers))}, {lazy} of them lazy")
    config = facts["config"]
    row("config", config["digest"])
    for name in ("created", "user", "workdir", "entrypoint", "cmd", "ports", "volumes", "stop_signal"):
        if config[name]:
            value = config[name]
            row(f"  {name.replace('_', ' ')}", " ".join(map(str, value)) if isinstance(value, list) else value)
    if config["env"]:
        row("  env", f"{len(config['env'])} variables")
    out.line("layers")
    for number, layer in enumerate(layers):
        descriptor = layer.descriptor
        verdict = "lazy" if layer.lazy else f"in full: {layer.reason}"
        files = f", {layer.entries} entries" if layer.entries >= 0 else ""
        digest = descriptor.digest if whole else descriptor.digest[:19]
        out.line(f"  {number:>3}  {digest}  {format_size(descriptor.size):>9}  {layer.form:<12}  {verdict}{files}")
        if whole:
            out.line(f"       {descriptor.media_type}, diff ID {layer.diff_id}")


def _print_timing(recorder: _Recorder, seconds: float, out: Output) -> None:
    from lazyfs.cli.output import count

    out.line("requests")
    for _, hop in sorted(recorder.hops, key=lambda item: item[1].started):
        status = str(hop.status) if hop.status else "–"
        what = f"{hop.kind:<9}  {hop.host}  {hop.what}  {format_size(hop.size)}"
        out.line(f"  {hop.seconds * 1000:8.1f} ms  {status:>3}  {what}")
    if not recorder.hops:
        out.line("  none: the image lies in a directory")
        return
    total = f"{count(len(recorder.hops), 'request')}, {count(recorder.sequential(), 'round trip')} in sequence"
    out.line(f"  {total}, {seconds * 1000:.1f} ms in all")


def _hop_json(hop: Hop, started: float) -> dict[str, Any]:
    return {
        "kind": hop.kind,
        "host": hop.host,
        "what": hop.what,
        "status": hop.status,
        "at_ms": round((hop.started - started) * 1000, 3),
        "ms": round(hop.seconds * 1000, 3),
        "size": hop.size,
    }
