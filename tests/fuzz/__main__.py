"""`python -m tests.fuzz TARGET --seconds N`: attack one parser. `python -m tests.fuzz --list` names them.

By atheris, coverage-guided, where it is installed; by the mutator in `mutate` otherwise. Findings are kept and the run
goes on; at its end it prints executions and findings, and its exit status is 1 when there are some.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Attack lazyfs' parsers.")
    parser.add_argument("target", nargs="?", help="a target's name, see --list")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where to keep them (./findings)")
    parser.add_argument("--corpus", type=Path, help="a directory in which atheris keeps what found new paths")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this one input, and show what comes of it")
    asked = parser.parse_args()
    atheris: Any = None
    if asked.engine != "random" and not asked.replay:
        try:
            atheris = import_module("atheris")
        except ImportError:
            if asked.engine == "atheris":
                parser.error("atheris is not installed: pip install atheris")
    if atheris is not None:
        with atheris.instrument_imports(include=["lazyfs", "snapshotter", "tomllib"]):
            from tests.fuzz import engines
    else:
        from tests.fuzz import engines
    if asked.list or not asked.target:
        print("\n".join(sorted(engines.TARGETS)))
        return 0
    if asked.target not in engines.TARGETS:
        parser.error(f"no target is called {asked.target!r}: {', '.join(sorted(engines.TARGETS))}")
    target = engines.TARGETS[asked.target]
    engines.bound_memory()
    if asked.replay:
        from tests.fuzz.target import run_one

        run_one(target, asked.replay.read_bytes())
        return 0
    run = engines.Run(target, asked.seconds, asked.findings)
    if atheris is not None:
        engines.by_atheris(atheris, run, asked.seed, asked.corpus)
    else:
        engines.by_chance(run, asked.seed)
    return run.summary()


if __name__ == "__main__":
    sys.exit(main())
