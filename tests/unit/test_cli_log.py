"""Log lines: one line each, key=value, at the level that was asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import log
from lazyfs.errors import UsageError


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    names = ("lazyfs", "indexer", "snapshotter")
    before = {n: (logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names}
    yield
    for name, (level, propagate) in before.items():
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


def test_lines_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.set_up(1, file=path)
    logging.getLogger("lazyfs.chunks.store").info("passed by: %s", 'no "space"\nleft')
    logging.getLogger("lazyfs.chunks.store").debug("not shown")
    logging.getLogger("indexer.layer").warning("odd")
    first, second = path.read_text("utf-8").splitlines()
    assert first.startswith("time=20")
    assert first.endswith(r' level=info logger=lazyfs.chunks.store message="passed by: no \"space\"\nleft"')
    assert second.endswith(" level=warning logger=indexer.layer message=odd")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_traceback_stays_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.set_up(file=path)
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("lazyfs").exception("failed")
    (line,) = path.read_text("utf-8").splitlines()
    assert r"trace=" in line and r"\nValueError: x" in line


def test_setting_up_again_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up(2, file=tmp_path / "log")
    log.set_up(0)
    logging.getLogger("lazyfs").warning("once")
    logging.getLogger("lazyfs").info("not at all")
    assert (tmp_path / "log").read_text() == ""
    assert capsys.readouterr().err.count("once") == 1


def test_a_log_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be opened"):
        log.set_up(file=tmp_path / "missing" / "log")


def test_what_a_line_is_about_is_in_pairs_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.set_up(1, file=path)
    about = log.fields(image="r.test/app:1", layer="", snapshot='k 1"', seconds=0.12345, message="not this")
    logging.getLogger("snapshotter").info("not lazy: %s", "it has no TOC", extra=about)
    (line,) = path.read_text("utf-8").splitlines()
    assert line.endswith(r' message="not lazy: it has no TOC" image=r.test/app:1 snapshot="k 1\"" seconds=0.123')


def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_LOG", "json")
    path = tmp_path / "log"
    log.set_up(1, file=path)
    logging.getLogger("lazyfs").warning("odd \n\x1b\udc80", extra=log.fields(chain="c"))
    told = json.loads(path.read_text("ascii"))
    assert (told["level"], told["message"], told["chain"]) == ("warning", "odd \n\x1b\udc80", "c")
