"""From an image config and the user's options to the runtime's configuration."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from lazyfs.container import bundle, host
from lazyfs.container.host import Host
from lazyfs.container.options import (
    ImageDefaults,
    RunOptions,
    Volume,
    check_hostname,
    check_name,
    command_line,
    environment,
    parse_image_defaults,
    parse_signal,
    parse_volume,
)
from lazyfs.container.users import User
from lazyfs.errors import ContainerFailed, DocumentInvalid, UsageError

ROOT = User(0, 0, (6,), "/root")
HOST = Host(("CAP_CHOWN", "CAP_KILL"), "v1", 0, "machine")


def image(**config: Any) -> ImageDefaults:
    return parse_image_defaults({"config": config})


def build(options: RunOptions, defaults: ImageDefaults, user: User = ROOT, machine: Host = HOST) -> dict[str, Any]:
    binds = [bundle.Bind("/stage/0", "/data", True)]
    built = bundle.build(
        "0123456789abcdef", rootfs="/r", options=options, image=defaults, user=user, host=machine, binds=binds
    )
    json.dumps(built)
    return built


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "words", "flag", "expected"),
    [
        (["e"], ["c"], (), None, ["e", "c"]),
        (["e"], ["c"], ("w",), None, ["e", "w"]),
        (["e"], ["c"], (), "f", ["f"]),
        (["e"], ["c"], ("w",), "f", ["f", "w"]),
        (["e"], ["c"], ("w",), "", ["w"]),
        (None, ["c"], (), None, ["c"]),
    ],
)
def test_entrypoint_and_command(
    entrypoint: Any, cmd: Any, words: tuple[str, ...], flag: str | None, expected: list[str]
) -> None:
    options = RunOptions(command=words, entrypoint=flag)
    assert command_line(options, image(Entrypoint=entrypoint, Cmd=cmd)) == expected


def test_nothing_to_run_is_told() -> None:
    for options in (RunOptions(), RunOptions(entrypoint="")):
        with pytest.raises(UsageError, match="names no command"):
            command_line(options, image(Cmd=["c"]) if options.entrypoint is not None else image())


def test_environment_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "here")
    monkeypatch.delenv("GONE", raising=False)
    options = RunOptions(env=("A=flag=x", "OURS", "GONE", "EMPTY="))
    found = environment(options, image(Env=["A=1", "GONE=2", "PATH=/bin"]), {"PATH": "/default", "HOME": "/h"})
    assert found == ["PATH=/bin", "HOME=/h", "A=flag=x", "OURS=here", "EMPTY="]
    with pytest.raises(UsageError, match="malformed"):
        environment(RunOptions(env=("=x",)), image(), {})


def test_configuration() -> None:
    options = RunOptions(command=("sh",), terminal=True, read_only=True, workdir="rel", env=("K=V",))
    built = build(options, image(WorkingDir="/w"), User(33, 34, (77,), "/srv"))
    process = built["process"]
    assert process["user"] == {"uid": 33, "gid": 34, "additionalGids": [77]}
    assert (process["cwd"], process["terminal"], process["args"]) == ("/rel", True, ["sh"])
    assert {"HOME=/srv", "TERM=xterm", "HOSTNAME=machine", "K=V"} <= set(process["env"])
    assert any(variable.startswith("PATH=/usr/local/sbin:") for variable in process["env"])
    assert process["capabilities"]["bounding"] == ["CAP_CHOWN", "CAP_KILL"]
    assert "inheritable" not in process["capabilities"] and "ambient" not in process["capabilities"]
    assert "oomScoreAdj" not in process  # raising it needs CAP_SYS_RESOURCE
    assert built["root"] == {"path": "/r", "readonly": True}
    assert built["mounts"][-1] == {
        "destination": "/data",
        "type": "bind",
        "source": "/stage/0",
        "options": ["rbind", "rprivate", "ro"],
    }


def test_devices_are_refused_where_control_groups_work() -> None:
    linux = build(RunOptions(command=("sh",)), image())["linux"]
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert linux["cgroupsPath"] == "/lazyfs-0123456789abcdef"


def test_no_device_nodes_without_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cgroup", lambda: "")
    assert "CAP_MKNOD" not in host.look().capabilities


@pytest.mark.parametrize(("network", "cgroup"), [("host", "v1"), ("none", "v2")])
def test_namespaces_and_names(network: str, cgroup: str) -> None:
    built = build(RunOptions(command=("sh",), network=network), image(), machine=Host((), cgroup, 0, "machine"))
    kinds = {entry["type"] for entry in built["linux"]["namespaces"]}
    assert {"pid", "ipc", "uts", "mount"} <= kinds
    assert ("network" in kinds) == (network == "none")
    assert ("cgroup" in kinds) == (cgroup == "v2")
    assert built["hostname"] == ("machine" if network == "host" else "0123456789ab")


def test_rootless() -> None:
    alone = Host((), "", 1, "machine")
    built = build(RunOptions(command=("sh",)), image(), machine=alone)
    by_target = {mount["destination"]: mount for mount in built["mounts"]}
    assert "gid=5" not in by_target["/dev/pts"]["options"]
    assert "rbind" in by_target["/sys"]["options"] and "ro" in by_target["/sys"]["options"]
    assert "/sys/fs/cgroup" not in by_target
    assert "cgroupsPath" not in built["linux"] and "resources" not in built["linux"]
    with pytest.raises(ContainerFailed, match="no subordinate ids"):
        build(RunOptions(command=("sh",)), image(), User(33, 0, (), "/"), alone)
    assert build(RunOptions(command=("sh",)), image(), User(33, 0, (), "/"), Host((), "", 65537, "m"))


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"Cmd": "sh"},
        {"Cmd": [1]},
        {"Cmd": ["a\0b"]},
        {"Env": ["NOVALUE"]},
        {"Env": ["=x"]},
        {"User": 0.5},
        {"WorkingDir": ["/"]},
        {"StopSignal": "SIGNONE"},
        {"Env": ["A=b"] * 10_001},
    ],
)
def test_broken_image_config(config: Any) -> None:
    with pytest.raises(DocumentInvalid):
        parse_image_defaults({"config": config})


def test_empty_image_config() -> None:
    empty = ImageDefaults((), (), (), "", "", signal.SIGTERM)
    for document in ({}, {"config": None}, {"config": {"Cmd": None, "Env": None}}):
        assert parse_image_defaults(document) == empty


@pytest.mark.parametrize(
    ("text", "number"),
    [("", 15), ("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", signal.SIGRTMIN + 3), ("RTMIN", signal.SIGRTMIN)],
)
def test_stop_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["0", "65", "999", "SIGRTMIN+99", "SIGRTMIN+", "KILL+1", "-9", "٣"])
def test_wrong_stop_signals(text: str) -> None:
    with pytest.raises(DocumentInvalid):
        parse_signal(text)


def test_volumes(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert parse_volume(f"{link}:/a/../b/") == Volume(str(tmp_path), "/b", False)
    assert parse_volume(f"{tmp_path}:/b:ro").read_only
    assert not parse_volume(f"{tmp_path}:/b:rw").read_only


@pytest.mark.parametrize(
    "text", ["/tmp", "/tmp:", "/tmp:b", "/tmp:/", "/tmp:/b:x", ":/b", "/tmp:/b:ro:z", "/no/such:/b"]
)
def test_wrong_volumes(text: str) -> None:
    with pytest.raises(UsageError, match="volume"):
        parse_volume(text)


def test_names() -> None:
    assert check_name("web-1.x_y") == "web-1.x_y"
    assert check_hostname("a.example") == "a.example"
    for bad in ("", ".", "..", "a/b", "-a", "a" * 65, "a\n"):
        with pytest.raises(UsageError):
            check_name(bad)
        with pytest.raises(UsageError):
            check_hostname(bad)


def test_cores_are_limited_as_they_are_for_whoever_starts_it() -> None:
    built = build(RunOptions(command=("sh",)), image(), machine=Host((), "v1", 0, "machine", core=(1 << 20, -1)))
    assert built["process"]["rlimits"] == [{"type": "RLIMIT_CORE", "soft": 1 << 20, "hard": 2**64 - 1}]
