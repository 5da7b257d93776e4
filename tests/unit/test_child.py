"""Jobs in a child process: their results, their errors, and children that die, hang or talk nonsense."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lazyfs import child
from lazyfs.child import Builder, read_answer, refuse, run_job
from lazyfs.errors import LazyfsError, StoreBroken, StoreFull, TarInvalid, TocInvalid
from lazyfs.format.table import FORM_ZSTD_CHUNKED, LayerTable
from lazyfs.tree import Tree
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.tars import file, tar_of, whiteout


def toc_job(directory: Path, *entries: bytes, name: str = "table") -> dict[str, Any]:
    layer = zstd_chunked_layer(tar_of(*entries))
    toc = directory / f"{name}.toc"
    toc.write_bytes(layer.toc)
    return {
        "toc": str(toc),
        "out": str(directory / name),
        "form": FORM_ZSTD_CHUNKED,
        "blob_size": len(layer.blob),
        "payload_end": layer.payload_end,
    }


def test_tables_and_their_tree_in_one_job(tmp_path: Path) -> None:
    tables = [
        toc_job(tmp_path, file("d/a", b"x"), file("b"), name="one"),
        toc_job(tmp_path, whiteout("b"), file("d/c"), name="two"),
    ]
    out = tmp_path / "tree"
    run_job({"tables": tables, "tree": {"tables": [task["out"] for task in tables], "out": str(out)}})
    table, tree = LayerTable(tmp_path / "one"), Tree(out)
    assert table.find(b"d/a") is not None
    assert (table.blob_size, table.payload_end) == (tables[0]["blob_size"], tables[0]["payload_end"])
    assert [tree.name(row) for row in range(tree.rows)] == [b"", b"d", b"a", b"c"]
    table.close()
    tree.close()


def test_what_the_child_raises_arrives(tmp_path: Path) -> None:
    job = toc_job(tmp_path, file("a"))
    Path(job["toc"]).write_bytes(b'{"version":1,"entries":[{"name":"../x","type":"reg"}]}')
    with pytest.raises(TocInvalid, match=r"\.\./x"):
        run_job({"tables": [job]})
    Path(job["toc"]).write_bytes(b'{"version":1,"entries":[{"name":"a","type":"hardlink","linkName":"b"}]}')
    with pytest.raises(TarInvalid, match="'b', which is not in this layer"):
        run_job({"tables": [job]})
    assert not Path(job["out"]).exists()
    with pytest.raises(StoreBroken):
        run_job({"tables": [{**job, "toc": str(tmp_path / "absent")}]})


def test_a_builder_keeps_its_process_for_the_next_job(tmp_path: Path) -> None:
    builder = Builder()
    builder.warm()
    [process] = builder._idle
    assert process is not None
    for name in ("one", "two"):
        builder.run({"tables": [toc_job(tmp_path, file("a"), name=name)]})
        assert builder._idle == [process]
    with pytest.raises(StoreBroken):
        builder.run({"tables": [{**toc_job(tmp_path, file("a")), "toc": "absent"}]})
    assert builder._idle == [process], "an error is an answer"
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n", "it ends before the daemon and its pods"
    builder.close()
    assert process.returncode == 0


def test_jobs_at_once_get_a_process_each(tmp_path: Path) -> None:
    builder = Builder()
    jobs = [{"tables": [toc_job(tmp_path, file("a"), name=f"t{i}")]} for i in range(4)]
    threads = [threading.Thread(target=builder.run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    builder.close()
    assert all((tmp_path / f"t{i}").exists() for i in range(4))


def test_a_process_that_is_free_soon_is_waited_for(tmp_path: Path) -> None:
    builder = Builder()
    builder.warm()
    [process] = builder._idle
    builder.run({"tables": [toc_job(tmp_path, file("a"), name="one")]})
    taken = builder._take()
    assert taken is process
    builder.warm()
    assert not builder._idle, "starting another would take longer than the one at work does"
    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(builder._take()))
    other.start()
    assert builder._keep(process)
    builder._done()
    other.join(60)
    assert found in ([process], [None]), "None: this machine took longer than a process takes to start"
    if found == [process]:
        assert builder._keep(process)
    builder._done()
    builder.run({"tables": [toc_job(tmp_path, file("a"), name="two")]})
    builder.close()
    assert (tmp_path / "two").exists()


def test_a_killed_idle_process_is_replaced(tmp_path: Path) -> None:
    builder = Builder()
    builder.run({"tables": [toc_job(tmp_path, file("a"), name="one")]})
    [idle] = builder._idle
    assert idle is not None
    idle.kill()
    idle.wait(10)
    builder.run({"tables": [toc_job(tmp_path, file("a"), name="two")]})
    builder.close()
    idle.communicate()
    assert (tmp_path / "two").exists()


def test_a_job_that_kills_its_process_is_not_given_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    as_child(monkeypatch, f"open({str(asked)!r}, 'a').write('x'); os.kill(os.getpid(), 9)")
    builder = Builder()
    builder.warm()
    with pytest.raises(TocInvalid, match="status -9"):
        builder.run({})
    assert asked.read_text() == "x", "what took the machine's memory once takes it again"
    builder.close()


def test_a_daemon_of_many_open_files_builds_too(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        run_job({"tables": [toc_job(tmp_path, file("a"), name="one")]})
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "one").exists()


def test_a_closed_builder_keeps_no_process(tmp_path: Path) -> None:
    builder = Builder()
    builder.close()
    builder.warm()
    builder.run({"tables": [toc_job(tmp_path, file("a"), name="one")]})
    assert not builder._idle


def as_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let other code stand in for the child: `job` is the line that it got."""
    words = [sys.executable, "-c", "import os, sys, time; job = sys.stdin.readline()\n" + code]
    monkeypatch.setattr(child, "command", lambda module, *more: words)


@pytest.mark.parametrize(
    "code",
    [
        "print('no json', flush=True)",
        "print('5', flush=True)",
        "print('[]', flush=True)",
        "print('{}', flush=True)",
        "print('null', flush=True)",
        "print('{\"ok\": false}', flush=True)",
        "print('[' * 100000, flush=True)",
        "sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()",
        "sys.stdout.write('{\"ok\"'); sys.stdout.flush()",
        "sys.stdout.write('x' * (3 << 20)); sys.stdout.flush()",
        "sys.exit(0)",
        "os.kill(os.getpid(), 9)",
        "os.kill(os.getpid(), 11)",
        "raise KeyError('a bug')",
    ],
)
def test_anything_but_an_answer_blames_the_toc(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    as_child(monkeypatch, code)
    builder = Builder()
    with pytest.raises(TocInvalid):
        builder.run({}, timeout=30)
    assert not builder._idle, "such a process gets no other job"
    builder.close()


def test_the_last_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    as_child(monkeypatch, "raise KeyError('what went wrong')")
    with pytest.raises(TocInvalid, match=r"status 1\): KeyError: 'what went wrong'"):
        run_job({})


def test_a_child_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    as_child(monkeypatch, f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    started = time.monotonic()
    with pytest.raises(TocInvalid, match="took more than 2 s"):
        run_job({}, timeout=2.0)
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A TOC that needs more than the limit is refused, whether the process could still say so or not."""
    job = toc_job(tmp_path, file("a"))
    names = ",".join(f'{{"name":"f{i}","type":"reg"}}' for i in range(200_000))
    Path(job["toc"]).write_text(f'{{"version":1,"entries":[{names}]}}')
    code = (
        "import lazyfs.child as child, sys\n"
        "child.CHILD_MEMORY = 60 << 20\n"
        "from lazyfs.format import toc, table_build\n"
        "sys.exit(child.main())\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        input=json.dumps({"tables": [job]}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    with pytest.raises(TocInvalid, match=r"GiB to read|process that read it died"):
        read_answer(done.stdout.encode(), done.stderr.encode(), done.returncode)


def test_nothing_is_imported_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "lazyfs").mkdir()
    (tmp_path / "lazyfs" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    run_job({})


def test_a_child_that_can_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "command", lambda module, *more: ["/absent/python"])
    with pytest.raises(StoreBroken, match="can't be started"):
        run_job({})


def test_answers_carry_class_sentence_and_hint() -> None:

    error = StoreFull("no room", hint="make some")
    with pytest.raises(StoreFull) as caught:
        read_answer(json.dumps(refuse(error)).encode(), b"", 0)
    assert str(caught.value) == "no room (make some)"
    with pytest.raises(TarInvalid, match="processor time"):
        read_answer(b"", b"", -signal.SIGXCPU, TarInvalid)
    with pytest.raises(LazyfsError):
        read_answer(b'{"error": 5}', b"", 0)
