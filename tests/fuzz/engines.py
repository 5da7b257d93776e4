"""What drives the targets: atheris, or chance; and what is kept of a run."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz import blobs, texts
from tests.fuzz.mutate import mutate
from tests.fuzz.target import MEMORY, SCRATCH, Target, place, run_one

TARGETS: dict[str, Target] = {target.name: target for target in (*blobs.TARGETS, *texts.TARGETS)}
_POOL = 500  # inputs that chance builds upon


def bound_memory() -> None:
    """Have an input that wants more memory than any may fail, rather than the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


class Run:
    """One run over a target: counts, and findings, one for each place in the code that raised."""

    def __init__(self, target: Target, seconds: float, findings: Path) -> None:
        self.target = target
        self.executions = 0
        self.findings: dict[str, Path] = {}
        self._where = findings
        self._began = time.monotonic()
        self._end = self._began + seconds

    @property
    def over(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() >= self._end

    def attack(self, data: bytes) -> None:
        """Parse one input, and keep it if that is a finding."""
        self.executions += 1
        try:
            run_one(self.target, data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._keep(data, error)

    def _keep(self, data: bytes, error: BaseException) -> None:
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        key = f"{type(error).__name__} at {places[-1] if places else '?'}"
        if key in self.findings:
            return
        self._where.mkdir(parents=True, exist_ok=True)
        path = self._where / f"{self.target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        self.findings[key] = path
        print(f"FINDING {key}: {str(error)[:300]}\n  kept as {path}", flush=True)
        traceback.print_exception(error, limit=-6, file=sys.stdout)

    def summary(self) -> int:
        """Print what the run was; return its exit status."""
        took = time.monotonic() - self._began
        print(
            f"{self.target.name}: {self.executions} executions in {took:.0f} s, {len(self.findings)} findings",
            flush=True,
        )
        return 1 if self.findings else 0


def by_chance(run: Run, seed: int) -> None:
    """Attack with inputs made by the mutator alone, from the seeds and from what it made of them."""
    source = random.Random(seed)
    pool = list(run.target.seeds())
    for data in list(pool):
        run.attack(data)
    seeds = len(pool)
    while not run.over:
        data = mutate(run.target, source.choice(pool), pool, source)
        run.attack(data)
        if source.random() < 0.1:  # go on from it
            if len(pool) < _POOL:
                pool.append(data)
            else:
                pool[source.randrange(seeds, _POOL)] = data


def by_atheris(atheris: Any, run: Run, seed: int, corpus: Path | None) -> None:
    """Attack with inputs that atheris makes, guided by which lines they reach. Doesn't return: libFuzzer ends us."""
    source = random.Random(seed)
    seeds = list(run.target.seeds())
    for data in seeds:
        run.attack(data)
    where = corpus or place() / "corpus"
    where.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (where / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def one(data: bytes) -> None:
        run.attack(data)
        if run.over:
            status = run.summary()
            SCRATCH.cleanup()
            os._exit(status)

    def change(data: bytes, most: int, number: int) -> bytes:
        if run.target.json and source.random() < 0.5:
            return mutate(run.target, data, seeds, source)[:most]
        changed: bytes = atheris.Mutate(data, most)
        return changed

    flags = [f"-seed={seed + 1}", f"-max_len={run.target.most}", "-timeout=60", f"-rss_limit_mb={MEMORY >> 20}"]
    if run.target.words:
        words = where.with_suffix(".words")
        words.write_text("".join(f'"{_quoted(word)}"\n' for word in run.target.words))
        flags.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], str(where), *flags], one, custom_mutator=change, enable_python_coverage=True)
    atheris.Fuzz()


def _quoted(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)
