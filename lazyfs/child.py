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

from lazyfs.answer import decode_error, encode_error
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
    read_answer(done.stdout, done.stderr, done.returncode)


def read_answer(answer: bytes, complaint: bytes, status: int) -> None:
    """Raise what a child's answer (its standard output) says went wrong, or TocInvalid when it gave none."""
    try:
        value = json.loads(answer)
    except ValueError:
        tail = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise TocInvalid(f"the table builder died (status {status}): {tail[:200]}") from None
    if "error" in value:
        raise decode_error(value["error"], TocInvalid)


def refuse(error: LazyfsError) -> dict[str, Any]:
    """Return the answer that carries an error to the parent."""
    return {"error": encode_error(error)}


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
        answer = refuse(error)
    except MemoryError:
        answer = refuse(TocInvalid(f"the TOC needs more than {MEMORY >> 30} GiB to read"))
    except OSError as error:
        answer = refuse(StoreBroken(f"a table can't be built: {error}"))
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
