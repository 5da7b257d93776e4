"""What the commands have in common that start workloads over links: arguments, results, one workload after another."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from perf import machine, workloads
from perf.limit import Link
from perf.shaper import Shaper
from perf.start import scratch
from perf.startup_node import Road
from perf.workloads import Workload
from tests.helpers import real

CACHE = Path("/var/tmp/lazyfs-startup-images")


def add_workloads(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """Add --workloads (`args.workloads`: names, see `named`)."""
    parser.add_argument("--workloads", nargs="+", default=default, metavar="NAME")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add --cache (`args.cache`, a path)."""
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("LAZYFS_STARTUP_IMAGES", CACHE)),
                        metavar="DIR", help=f"where images are kept ($LAZYFS_STARTUP_IMAGES, {CACHE})")  # fmt: skip


def named(names: Iterable[str]) -> list[Workload]:
    """Return the workloads of these names. Raise ValueError in words for a user."""
    names = list(names)
    if unknown := [name for name in names if name not in workloads.BY_NAME]:
        raise ValueError(f"{', '.join(unknown)} is no workload: say some of {', '.join(workloads.BY_NAME)}")
    return [workloads.BY_NAME[name] for name in names]


class Results:
    """JSON lines, each with the machine that it was measured on, and when."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._facts = machine.facts()
        self.bad = False
        self.last: dict[str, Any] = {}

    def add(self, what: str, **found: Any) -> None:
        self.last = {"what": what, **found, **self._facts, "date": machine.now()}
        print(json.dumps(self.last), file=self._out, flush=True)

    def failed(self, error: BaseException, **where: Any) -> None:
        self.bad = True
        print(f"startup: {where}: {error}"[-4000:], file=sys.stderr)
        self.add("failed", **where, error=str(error)[:1000])


def in_turn(
    chosen: Iterable[Workload],
    results: Results,
    failures: tuple[type[BaseException], ...],
    work: Callable[[Workload, Path], None],
) -> None:
    """Do `work(workload, directory)` for each of them, in an empty directory. One that fails is told and passed."""
    for workload in chosen:
        with scratch() as directory:
            try:
                work(workload, directory)
            except failures as error:
                results.failed(error, workload=workload.name)


@contextlib.contextmanager
def road(link: Link, registry: real.DockerRegistry) -> Iterator[Road]:
    """Yield the way to the registry over a link."""
    if not (link.rtt or link.mbit):
        yield Road(registry, None)
        return
    with Shaper(("127.0.0.1", registry.port), rtt=link.rtt, mbit=link.mbit) as shaper:
        yield Road(registry, shaper)
