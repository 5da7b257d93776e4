"""The short-lived process that turns TOCs into layer tables, tables into a tree, and a tree into an EROFS image.

Parsing half a million entries takes hundreds of megabytes; a process that ends gives them back, a daemon does not. It
gets jobs as JSON objects on standard input, one a line, and answers each with one on standard output:

    {"tables": [{"toc": PATH, "out": PATH, "form": N, "blob_size": N, "payload_end": N}],
     "tree": {"tables": [PATH], "out": PATH},
     "erofs": {"tree": PATH, "tables": [PATH], "key": TREE_KEY, "out": PATH}}
    {"ok": true}    or    {"error": {"class": "TocInvalid", "message": "…"}}
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lazyfs.answer import decode_error, encode_error
from lazyfs.errors import FormatError, LazyfsError, StoreBroken, TocInvalid
from lazyfs.limits import (
    CHILD_MEMORY,
    CHILD_TIMEOUT,
    END_TIMEOUT,
    IDLE_CHILDREN,
    IDLE_WAIT,
    MAX_CHILD_ANSWER,
    STANDBY_WAIT,
)

_START = 0.1  # seconds that starting a process takes, of one core: one that is free sooner is waited for
_SOON = 0.3  # seconds that a process waits for its next job before it frees what the last one took
_GOES_FIRST = 1000  # oom_score_adj, the most there is


class Builder:
    """Runs jobs in child processes; two that are idle are kept for a few seconds, because starting costs 0.1 s.

    Thread-safe: jobs that come at once get a process each, unless one is free in the time that another takes to start.
    `warm` starts one ahead of need.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy = 0  # jobs under way
        self._closed = False

    def warm(self) -> None:
        """Start a process that imports what it needs while its job is still on the way. Doesn't block."""
        with self._changed:
            self._bury()
            if not self._idle and not self._busy and not self._closed:
                self._idle.append(_spawn())

    def run(self, job: dict[str, Any], *, timeout: float = CHILD_TIMEOUT) -> None:
        """Run `job` and wait for it. Blocking: at most `timeout` seconds.

        Raise what the child raised (FormatError, StoreError), or TocInvalid when it died of its limits.
        """
        child = self._take()
        try:
            if child is not None:
                answer, complaint, status = self._give(child, job, timeout)
            if child is None or not (answer or status):  # there was none, or it ended for want of work just now
                answer, complaint, status = self._give(_spawn(), job, timeout)
        finally:
            self._done()
        read_answer(answer, complaint, status)

    def _give(self, child: subprocess.Popen[bytes], job: dict[str, Any], timeout: float) -> tuple[bytes, bytes, int]:
        """Return a child's answer to a job, b"" when it died, with its last words and exit status when it has ended."""
        try:
            answer = _ask(child, job, timeout)
        except BaseException:
            child.kill()
            _end(child)
            raise
        if _is_answer(answer) and self._keep(child):
            return answer, b"", 0
        return answer, *_end(child)

    def _take(self) -> subprocess.Popen[bytes] | None:
        """Return an idle process, None: to be started."""
        with self._changed:
            if self._busy:
                self._changed.wait_for(lambda: self._idle, _START)
            self._busy += 1
            self._bury()
            return self._idle.pop() if self._idle else None

    def _bury(self) -> None:
        """Reap the idle processes that have ended for want of work, or were killed."""
        for child in [child for child in self._idle if child.poll() is not None]:
            _end(child)
            self._idle.remove(child)

    def _keep(self, child: subprocess.Popen[bytes]) -> bool:
        with self._changed:
            if self._closed or len(self._idle) >= IDLE_CHILDREN:
                return False
            self._idle.append(child)
            return True

    def _done(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify()

    def close(self) -> None:
        """End the idle processes, and each of the others with its job."""
        with self._changed:
            self._closed = True
            children, self._idle = self._idle, []
        for child in children:
            _end(child)


def run_job(job: dict[str, Any], *, timeout: float = CHILD_TIMEOUT) -> None:
    """Run one job in a process of its own. Blocking; errors as `Builder.run`."""
    builder = Builder()
    try:
        builder.run(job, timeout=timeout)
    finally:
        builder.close()


def command(module: str, *words: str) -> list[str]:
    """Return the command line that runs a module's `main`: the one of this installation, whatever the directory.

    `python -m` would import from the current directory first, and that may be anybody's. The child looks for modules
    where this process does and leaves `site` out, which takes longer to find the same places than all else to start.
    """
    places = [place for place in sys.path if os.path.isabs(place)]
    places.append(str(Path(__file__).parents[1]))
    code = f"import sys; sys.path[:] = {places!r}; from {module} import main; sys.exit(main())"
    return [sys.executable, "-P", "-S", "-c", code, *words]


def _spawn() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command("lazyfs.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise StoreBroken(f"the table builder can't be started: {error.strerror}") from None


def _ask(child: subprocess.Popen[bytes], job: dict[str, Any], timeout: float) -> bytes:
    """Return the child's answer line; b"" when it died. Raise TocInvalid when it takes too long."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return b""
    answer, deadline = b"", time.monotonic() + timeout
    coming = select.poll()  # select(2) takes no number above 1023, and a daemon of many layers has such
    coming.register(child.stdout, select.POLLIN)
    while not answer.endswith(b"\n") and len(answer) < MAX_CHILD_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0 or not coming.poll(left * 1000):
            raise TocInvalid(f"its TOC took more than {timeout:.0f} s to read")
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part:
            return b""
        answer += part
    return answer


def _end(child: subprocess.Popen[bytes]) -> tuple[bytes, int]:
    """Close a child's pipes and reap it. Return its last words and its exit status."""
    complaint = b""
    try:
        _, complaint = child.communicate(timeout=END_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel, for a disk, is left to it
            _, complaint = child.communicate(timeout=END_TIMEOUT)
    except BrokenPipeError:
        with suppress(subprocess.TimeoutExpired):
            child.wait(END_TIMEOUT)
    return complaint, -signal.SIGKILL if child.returncode is None else child.returncode


def _parse(answer: bytes) -> dict[str, Any]:
    """Return the object of an answer, {} for anything that is none."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and (value.get("ok") is True or "error" in value) else {}


def _is_answer(answer: bytes) -> bool:
    return bool(_parse(answer))


def read_answer(answer: bytes, complaint: bytes, status: int, blame: type[FormatError] = TocInvalid) -> None:
    """Raise what a child's answer (its standard output) says went wrong, or a `blame` when it gave none that counts."""
    value = _parse(answer)
    if "error" in value:
        raise decode_error(value["error"], blame)
    if value:
        return
    if status == -signal.SIGBUS:
        raise StoreBroken("the disk of the store lost bytes while they were read")
    if status == -signal.SIGXCPU:
        raise blame("it took more processor time to read than any layer may")
    tail = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if status == -signal.SIGKILL:
        tail = "somebody killed it, most likely the kernel for want of memory"
    raise blame(f"the process that read it died (status {status})" + (f": {tail[:200]}" if tail else ""))


def refuse(error: LazyfsError) -> dict[str, Any]:
    """Return the answer that carries an error to the parent."""
    return {"error": encode_error(error)}


def _perform(job: dict[str, Any], kept: list[object]) -> None:
    """Do a job; leave in `kept` what takes long to free, but nothing of earlier tables."""
    from lazyfs.format.table import LayerTable
    from lazyfs.format.table_build import LayerFacts, build_table
    from lazyfs.format.toc import parse_toc
    from lazyfs.tree import Tree, build_tree

    for task in job.get("tables", ()):
        kept.clear()
        facts = LayerFacts(task["form"], task["blob_size"], task["payload_end"])
        listing = parse_toc(_mapped(task["toc"]), task["payload_end"])
        kept.append(listing)
        build_table(Path(task["out"]), facts, listing)
    opened: dict[str, LayerTable] = {}

    def tables(paths: list[str]) -> list[LayerTable]:
        for path in paths:
            if path not in opened:
                opened[path] = LayerTable(Path(path))
        return [opened[path] for path in paths]

    tree = job.get("tree")
    if tree:
        build_tree(Path(tree["out"]), tables(tree["tables"]))
    erofs = job.get("erofs")
    if erofs:
        from lazyfs.format.erofs_write import write_erofs

        write_erofs(Path(erofs["out"]), Tree(Path(erofs["tree"])), tables(erofs["tables"]), erofs["key"])


def _mapped(path: str) -> bytes | mmap.mmap:
    """Return a file's bytes without a copy: the store replaces files and changes none."""
    with open(path, "rb") as handle:
        if os.fstat(handle.fileno()).st_size == 0:
            return b""
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def limit(what: int, amount: int) -> None:
    """Set a resource limit (RLIMIT_*) of this process, or keep a lower one that it was started with."""
    hard = resource.getrlimit(what)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(what, (amount, hard))  # the hard limit of processor time kills without a word


def go_first() -> None:
    """Have the kernel end this process before any other when memory runs out: an image can make it large.

    It has the daemon's own protection from that otherwise.
    """
    with suppress(OSError, ValueError):
        path = Path("/proc/self/oom_score_adj")
        if int(path.read_text()) < _GOES_FIRST:
            path.write_text(str(_GOES_FIRST))


def _answer(line: str, kept: list[object]) -> dict[str, Any]:
    try:
        _perform(json.loads(line), kept)
        return {"ok": True}
    except LazyfsError as error:
        return refuse(error)
    except MemoryError:
        return refuse(TocInvalid(f"the TOC needs more than {CHILD_MEMORY >> 30} GiB to read"))
    except OSError as error:
        return refuse(StoreBroken(f"a table can't be built: {error}"))


def main() -> int:
    """Do the jobs on standard input, one a line, until there is none for a while. The answers say how each went."""
    from lazyfs import tree  # noqa: F401  while the first job is still on its way
    from lazyfs.format import erofs_write, table_build, toc  # noqa: F401

    limit(resource.RLIMIT_AS, CHILD_MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    go_first()
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # a standby is more urgent than others, and its child is not
    patience = STANDBY_WAIT
    kept: list[object] = []
    gc.disable()  # among millions of objects that all live to the end, looking for garbage takes half of the time
    while select.select([sys.stdin], [], [], patience)[0]:
        line = sys.stdin.readline()
        if not line:
            break
        print(json.dumps(_answer(line, kept)), flush=True)
        if not select.select([sys.stdin], [], [], _SOON)[0]:  # after a table a tree is wanted: somebody waits for it
            kept.clear()
            gc.collect()
        patience = IDLE_WAIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
