"""`lazyfs doctor`: each finding is true of the machine it looks at, and comes with the way to mend it."""

from __future__ import annotations

import json
import os
import resource
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.cli import host_checks
from lazyfs.cli.host_checks import Check, State
from lazyfs.cli.main import main
from lazyfs.config import Settings, load
from lazyfs.errors import MountFailed
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.tars import file, tar_of


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("LAZYFS_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("LAZYFS_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return load()


def findings(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in host_checks.all_checks(settings)}


def test_looking_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    findings(settings)
    assert list(tmp_path.iterdir()) == []
    # The whole table may change meanwhile: others mount too.
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_what_is_wrong_says_how_to_mend_it(settings: Settings) -> None:
    assert all(check.mend for check in findings(settings).values() if check.state is not State.OK)


def test_packages_are_found_with_their_versions(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    assert findings(settings)["zstandard"] == Check("zstandard", State.OK, zstandard.__version__)
    monkeypatch.setitem(__import__("sys").modules, "pyfuse3", None)
    missing = findings(settings)["pyfuse3"]
    assert missing.state is State.FAIL and "lazyfs[mount]" in missing.mend


@pytest.mark.parametrize(
    ("spoil", "state", "words"),
    [
        (lambda root: None, State.OK, "will be made"),
        (lambda root: root.mkdir(mode=0o700), State.OK, ""),
        (lambda root: (root.mkdir(), root.chmod(0o777)), State.FAIL, "can be written by others"),
        (lambda root: root.write_text(""), State.FAIL, "is no directory"),
        (lambda root: root.symlink_to("/does/not/exist"), State.FAIL, "No such file"),
    ],
    ids=["absent", "good", "open", "file", "dangling"],
)
def test_the_stores_directory(settings: Settings, spoil: Callable[[Path], object], state: State, words: str) -> None:
    spoil(settings.root)
    check = findings(settings)["store"]
    assert check.state is state and words in check.text


def test_a_store_of_somebody_else(settings: Settings) -> None:
    settings.root.mkdir()
    check = host_checks._store_directory(settings, os.geteuid() + 1)
    assert check.state is State.FAIL and f"belongs to user {os.geteuid()}" in check.text


def test_a_low_limit_of_open_files(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    check = findings(settings)["open files"]
    assert check.state is State.WARN and "1024" in check.text


def test_an_old_kernel(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "4.19.0-generic")
    assert findings(settings)["kernel"].state is State.WARN


@pytest.mark.parametrize(
    ("release", "euid", "hold", "state", "words"),
    [
        ("6.9.0-generic", 0, "1", State.OK, "yes"),
        ("10.1", 0, "1", State.OK, "yes"),
        ("6.8.12-generic", 0, "1", State.WARN, "no: a lazyfsd that dies takes its mounts along"),
        ("of our own", 0, "1", State.WARN, "no: a lazyfsd that dies takes its mounts along"),
        ("6.9.0", 1000, "1", State.OK, "no: root alone"),
        ("6.8.0", 1000, "1", State.OK, "no: root alone"),
        ("6.9.0", 0, "0", State.OK, "no, but for a lazyfsd started with --hold: the setting hold is false"),
    ],
)
def test_whether_mounts_outlive_the_daemon(
    monkeypatch: pytest.MonkeyPatch, release: str, euid: int, hold: str, state: State, words: str
) -> None:
    monkeypatch.setenv("LAZYFS_CONFIG", "/dev/null")
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setenv("LAZYFS_HOLD", hold)
    check = host_checks._outliving(load(), euid)
    assert check.state is state and check.text.startswith(words), check
    assert not check.mend if state is State.OK else "6.9" in check.mend


def test_no_runtime(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert findings(settings)["container runtime"].state is State.FAIL


def test_secrets_of_proxies_are_not_printed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", "localhost")
    texts = [check.text for check in host_checks.all_checks(settings) if check.name == "proxy"]
    assert any("http://proxy.test:3128" in text for text in texts)
    assert not any("secret" in text or "user" in text for text in texts)
    assert host_checks.without_secret("proxy.test:3128") == "proxy.test:3128"


def test_work_in_a_child_reports_what_went_wrong() -> None:
    def fail() -> None:
        raise MountFailed("can't mount x: Operation not permitted", errno=1)

    def vanish() -> None:
        os._exit(9)

    assert host_checks._in_child(lambda: None) == ""
    assert host_checks._in_child(fail) == "can't mount x: Operation not permitted"
    assert "9" in host_checks._in_child(vanish)


def test_work_in_a_child_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "TOOL_TIMEOUT", 0.2)
    pids: list[int] = []
    fork = os.fork

    def noted() -> int:
        pid = fork()
        pids.append(pid)
        return pid

    def hang() -> None:
        time.sleep(600)

    def speak_and_hang() -> None:
        if os.fork() == 0:  # has the pipe's end too, and outlives the child that is waited for
            os.close(over)
            os.read(wait, 1)
            os._exit(0)
        raise MountFailed("can't mount x", errno=1)

    monkeypatch.setattr(os, "fork", noted)
    assert host_checks._in_child(hang) == "no answer within 0 s"
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[-1], 0)  # it is gone already
    monkeypatch.setattr(host_checks, "TOOL_TIMEOUT", 30.0)  # which it does not take
    wait, over = os.pipe()
    assert host_checks._in_child(speak_and_hang) == "can't mount x"
    os.close(over)  # not before: it came back while somebody had the pipe
    os.close(wait)
    # A killed child that does not go: for a disk that is dead it would stay in the kernel.
    monkeypatch.setattr(host_checks, "TOOL_TIMEOUT", 0.2)
    monkeypatch.setattr(host_checks, "END_TIMEOUT", 0.2)
    monkeypatch.setattr(os, "waitpid", lambda pid, options: (0, 0))
    assert host_checks._in_child(hang) == "no answer within 0 s"
    monkeypatch.undo()
    os.waitpid(pids[-1], 0)


def test_the_fuse_device_as_it_is(settings: Settings) -> None:
    check = findings(settings)["/dev/fuse"]
    there = os.path.exists("/dev/fuse") and stat.S_ISCHR(os.stat("/dev/fuse").st_mode)
    if check.state is State.OK:
        assert there
    else:
        assert "chmod" in check.mend or "modprobe" in check.mend


def test_the_command_exits_8_when_something_needed_is_missing(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.root.write_text("")
    assert main(["doctor", "--json"]) == 8
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    (store,) = (check for check in told["checks"] if check["name"] == "store")
    assert (store["state"], store["mend"]) == ("fail", "choose another --root")
    assert main(["doctor"]) == 8
    assert "-> choose another --root" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "name", "state"),
    [
        (None, "ranges", "ok"),
        (Fault.IGNORE_RANGE, "ranges", "fail"),
        (Fault.STATUS, "registry", "fail"),
    ],
)
def test_the_registry_of_an_image(
    settings: Settings, capsys: pytest.CaptureFixture[str], fault: Fault | None, name: str, state: str
) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        layer = zstd_chunked_layer(tar_of(file("a", b"x" * 100_000)))
        image = registry.add_image("app", "1", [(layer.blob, layer.annotations, layer.media_type)])
        if fault is not None:
            registry.fault(fault, status=403, path="/blobs/" if fault is Fault.IGNORE_RANGE else "")
        main(["doctor", "--json", "--platform", "linux/amd64", image.reference])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks[name]["state"] == state
    if fault is None:
        assert "with a token" in checks["registry"]["text"]
        assert checks["layers"]["text"] == "1 of 1 can be lazy"
        assert "ms" in checks["latency"]["text"]


@pytest.mark.parametrize(("there", "mend"), [(True, "check the name and the tag"), (False, "network and proxy")])
def test_a_registry_that_does_not_help_says_what_to_look_at(
    settings: Settings, capsys: pytest.CaptureFixture[str], there: bool, mend: str
) -> None:
    with FakeRegistry() as registry:
        if not there:
            registry.stop_listening()
        assert main(["doctor", "--json", f"{registry.host}/none:1"]) == 8
    (found,) = (check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "registry")
    assert found["state"] == "fail" and mend in found["mend"]


def test_an_image_that_cannot_be_parsed_is_a_finding(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "ftp://x"]) == 8
    assert "unknown transport" in capsys.readouterr().out


@pytest.mark.parametrize(("left", "state"), [("80;w=21600", "ok"), ("3;w=21600", "warn"), ("many", "")])
def test_what_is_left_of_a_rate_limit(
    settings: Settings, capsys: pytest.CaptureFixture[str], left: str, state: str
) -> None:
    with FakeRegistry() as registry:
        registry.headers["RateLimit-Remaining"] = left
        registry.add_image("app", "1", [])
        main(["doctor", "--json", f"{registry.host}/app:1"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks.get("rate limit", {}).get("state", "") == state
    if state:
        assert left.partition(";")[0] in checks["rate limit"]["text"]
