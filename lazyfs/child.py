"""The short-lived process that turns TOCs into layer tables and tables into a tree.

Parsing half a million entries takes hundreds of megabytes; a process that ends gives them back, a daemon does not. It
gets one job as a JSON object on standard input and answers with one on standard output:

    {"tables": [{"toc": PATH, "out": PATH, "form": N, "blob_size": N, "payload_end": N}], "tree": {"tables": [PATH], "out": PATH}}
    {"ok": true}    or    {"error": {"class": "TocInvalid", "message": "…"}}
"""  # noqa: E501

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from lazyfs import errors
from lazyfs.errors import LazyfsError, StoreBroken, TocInvalid

MEMORY = 4 << 30  # bytes of address space: a TOC of half a million entries takes a fifth of it
TIMEOUT = 120.0  # seconds


def run_job(job: dict[str, Any], *, timeout: float = TIMEOUT) -> None:
    """Run `job` in a child process and wait for it. Blocking: at most `timeout` seconds.

    Raise what the child raised (FormatError, StoreError), or TocInvalid when it died of its limits.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lazyfs.child"],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TocInvalid(f"its TOC took more than {timeout:.0f} s to read") from None
    except OSError as error:
        raise StoreBroken(f"the table builder can't be started: {error.strerror}") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        tail = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise TocInvalid(f"the table builder died (status {done.returncode}): {tail[:200]}") from None
    if "error" in answer:
        kind = getattr(errors, str(answer["error"].get("class")), None)
        known = isinstance(kind, type) and issubclass(kind, LazyfsError)
        raise _revive(kind if known else TocInvalid, str(answer["error"].get("message")))


def _revive(kind: type[LazyfsError], message: str) -> LazyfsError:
    """Make an error of `kind` whose sentence is `message` as it stands, whatever its constructor takes."""
    error = kind.__new__(kind)
    LazyfsError.__init__(error, message)
    return error


def _perform(job: dict[str, Any]) -> None:
    from lazyfs.format.table import LayerTable
    from lazyfs.format.table_build import LayerFacts, build_table
    from lazyfs.format.toc import parse_toc
    from lazyfs.tree import build_tree

    for task in job.get("tables", ()):
        raw = Path(task["toc"]).read_bytes()
        facts = LayerFacts(task["form"], task["blob_size"], task["payload_end"])
        build_table(Path(task["out"]), facts, parse_toc(raw, task["payload_end"]))
        del raw
    tree = job.get("tree")
    if tree:
        build_tree(Path(tree["out"]), [LayerTable(Path(path)) for path in tree["tables"]])


def main() -> int:
    """Do the job on standard input. Exit status 0 whether it succeeded or not: the answer says which."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any]
    try:
        _perform(json.load(sys.stdin))
        answer = {"ok": True}
    except LazyfsError as error:
        answer = {"error": {"class": type(error).__name__, "message": error.message}}
    except MemoryError:
        answer = {"error": {"class": "TocInvalid", "message": f"the TOC needs more than {MEMORY >> 30} GiB to read"}}
    except OSError as error:
        answer = {"error": {"class": "StoreBroken", "message": f"a table can't be built: {error}"}}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
