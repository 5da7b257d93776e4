"""lazyfs install and uninstall on a node below a prefix: what is shown, written, left, and taken back."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.cli.main import main
from lazyfs.deploy import installation, manifest, services, units
from lazyfs.deploy.node import Node
from lazyfs.errors import StoreBroken, UsageError
from snapshotter.model import Kind
from snapshotter.store import Store

CONFIG = '# ours\nversion = 2\n[plugins."io.containerd.grpc.v1.cri"]\n  sandbox_image = "x/pause:1"  # inner\n'
Tree = dict[str, tuple[int, bytes]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node with lazyfs in /opt/lazyfs and a containerd."""
    for name in ("lazyfsd", "lazyfs-snapshotter"):
        path = tmp_path / "opt/lazyfs/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
    config = tmp_path / "etc/containerd/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(CONFIG)
    config.chmod(0o640)
    return tmp_path


@pytest.fixture
def node(root: Path) -> Node:
    return Node(root)


OPTIONS = installation.Options(Path("/opt/lazyfs/bin"), metrics=True)


def tree(root: Path) -> Tree:
    """Return every file and directory with its mode and bytes."""
    found = {}
    for path in sorted(root.rglob("*")):
        raw = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (stat.S_IMODE(path.stat().st_mode), raw)
    return found


def install(root: Path, *more: str) -> int:
    return main(["install", "--root-prefix", str(root), "--prefix", "/opt/lazyfs", *more])


def uninstall(root: Path, *more: str) -> int:
    return main(["uninstall", "--root-prefix", str(root), *more])


def test_there_and_back(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(root)
    assert install(root, "--yes", "--metrics", "--image-service", "--lazy-from", "r.example/a/*") == 0
    shown = capsys.readouterr()
    assert (
        '+  snapshotter = "lazyfs"' in shown.out
        and "--- /dev/null\n+++ /etc/systemd/system/lazyfsd.service" in shown.out
    )
    assert "new containers" in shown.err and "overlayfs" in shown.err and "imageServiceEndpoint" in shown.err
    assert "systemctl enable --now lazyfsd.service lazyfs-snapshotter.service" in shown.err
    settings = installation.settings_of(Node(root))
    assert (settings.lazy_from, settings.image_service) == (("r.example/a/*",), "/run/containerd/containerd.sock")
    assert settings.metrics_address and settings.snapshotter_metrics_address
    after = tree(root)
    assert install(root, "--yes") == 0  # as settings that are not named stay
    assert "nothing to change" in capsys.readouterr().out
    assert tree(root) == after
    assert after["etc/containerd/config.toml"][0] == 0o640
    assert uninstall(root, "--yes") == 0
    assert tree(root) == before


def test_nothing_is_written_unasked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(root)
    assert install(root, "--dry-run") == 0
    assert install(root) == 2
    shown = capsys.readouterr()
    assert shown.out.count("+[proxy_plugins.lazyfs]") == 2
    assert "nobody to ask" in shown.err
    assert tree(root) == before
    assert install(root, "--yes") == 0
    after = tree(root)
    assert uninstall(root, "--dry-run") == 0
    assert uninstall(root) == 2
    assert tree(root) == after


def test_json_is_one_object(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(root, "--yes", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["done"] and {one["path"]: one["made"] for one in told["changes"]} == {
        "/etc/systemd/system/lazyfsd.service": True,
        "/etc/systemd/system/lazyfs-snapshotter.service": True,
        "/etc/containerd/config.toml": False,
    }
    assert uninstall(root, "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left"] == {}


def test_what_somebody_changed_since_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(root, "--yes") == 0
    config, unit = root / "etc/containerd/config.toml", root / "etc/systemd/system/lazyfsd.service"
    config.write_text(config.read_text() + "# theirs\n")
    theirs = config.read_bytes()
    unit.unlink()
    assert uninstall(root, "--yes") == 2  # no new container would start
    told = capsys.readouterr().err
    assert "config.toml still makes lazyfs the snapshotter of new containers" in told and "--force" in told
    assert (root / "etc/systemd/system/lazyfs-snapshotter.service").exists() and config.read_bytes() == theirs
    assert uninstall(root, "--yes", "--force") == 0
    told = capsys.readouterr().err
    assert "config.toml still makes lazyfs" in told
    assert "/etc/containerd/config.toml stays as it is: it was changed since" in told
    assert config.read_bytes() == theirs
    assert (root / "etc/lazyfs/before").is_dir()  # what it was is still there, and was named
    assert not (root / "etc/systemd/system/lazyfs-snapshotter.service").exists()
    assert uninstall(root, "--yes") == 2
    assert "nothing was installed" in capsys.readouterr().err


def test_a_second_installation_keeps_what_was_before_the_first(root: Path) -> None:
    before = tree(root)
    assert install(root, "--yes", "--no-default") == 0
    assert install(root, "--yes") == 0
    assert uninstall(root, "--yes") == 0
    assert tree(root) == before


def test_what_somebody_changed_between_two_installations_stays(root: Path) -> None:
    assert install(root, "--yes", "--no-default") == 0
    config = root / "etc/containerd/config.toml"
    config.write_text(config.read_text() + "# theirs\n")
    assert install(root, "--yes") == 0
    config.write_text(config.read_text().replace('snapshotter = "lazyfs"', 'snapshotter = "overlayfs"'))
    assert uninstall(root, "--yes") == 0
    assert "# theirs" in config.read_text()


@pytest.mark.parametrize("version", [2, 3])
def test_a_name_in_another_file_than_the_address_is_found(root: Path, version: int) -> None:
    config = root / "etc/containerd/config.toml"
    cri = '"io.containerd.grpc.v1.cri".containerd' if version == 2 else '"io.containerd.cri.v1.images"'
    imports = 'imports = ["/etc/containerd/conf.d/*.toml"]'
    config.write_text(f'version = {version}\n{imports}\n[plugins.{cri}]\n  snapshotter = "overlayfs"\n')
    assert install(root, "--yes") == 0
    assert (root / "etc/containerd/conf.d/lazyfs.toml").exists()
    drop_in = root / "etc/containerd/conf.d/lazyfs.toml"
    theirs = config if version == 2 else drop_in  # where CRI's keys went
    theirs.write_text(theirs.read_text() + "# theirs\n")
    assert uninstall(root, "--yes") == 2
    assert drop_in.exists()


def test_logins_in_containerds_configuration_are_not_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = root / "etc/containerd/config.toml"
    secrets = (
        '[plugins."io.containerd.grpc.v1.cri".registry.configs."r.example".auth]\n'
        '  "password" = "s3cret"\n  identitytoken = \'s3cret\'\n  # auth = "s3cret"\n'
    )
    for text in (
        secrets,
        '[plugins."io.containerd.grpc.v1.cri".registry]\nconfigs = {"r.example" = {auth = {username = "u", '
        'password = "s3cret"}}}\n',
    ):
        config.write_text(CONFIG + text)
        assert install(root, "--yes") == 0
        shown = capsys.readouterr().out
        assert "(not shown)" in shown and "s3cret" not in shown and '+  snapshotter = "lazyfs"' in shown
        assert text in config.read_text()
        assert uninstall(root, "--yes") == 0
        assert "s3cret" not in capsys.readouterr().out
        assert config.read_text() == CONFIG + text


@pytest.mark.parametrize("failure", [KeyboardInterrupt, StoreBroken("the disk is full")])
def test_an_interruption_anywhere_can_be_taken_back(
    root: Path,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: type[BaseException] | BaseException,
) -> None:
    before = tree(root)
    write = Node.write
    for allowed in range(20):
        left = allowed

        def failing(self: Node, path: Path, raw: bytes, mode: int = 0o644) -> None:
            nonlocal left
            if left == 0:
                raise failure
            left -= 1
            write(self, path, raw, mode)

        with monkeypatch.context() as patch:
            patch.setattr(Node, "write", failing)
            code = install(root, "--yes", "--metrics")
        put_back = code != 0 and failure is not KeyboardInterrupt  # then it is as it was already
        assert (manifest.load(node) is None) == (allowed == 0 or put_back)
        if allowed and not put_back:
            assert uninstall(root, "--yes") == 0
            assert "stays as it is" not in capsys.readouterr().err
        assert tree(root) == before
        if code == 0:
            return
    raise AssertionError("it never succeeded")


def test_what_containerd_does_not_take_is_put_back(root: Path, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(root)
    monkeypatch.setattr(Node, "is_this", True)
    monkeypatch.setattr(services, "containerd_major", lambda: 1)
    cri = {"containerd": {"snapshotter": "overlayfs", "disable_snapshot_annotations": False}}
    address = "/run/lazyfs/snapshotter/snapshotter.sock"
    read = {"proxy_plugins": {"lazyfs": {"address": address}}, "plugins": {"io.containerd.grpc.v1.cri": cri}}
    monkeypatch.setattr(services, "what_containerd_reads", lambda main: read)
    planned = installation.plan(node, OPTIONS)
    with pytest.raises(UsageError, match=r"takes overlayfs for CRI.*put back") as told:
        installation.carry_out(node, OPTIONS, planned)
    assert 'snapshotter = "lazyfs"' in told.value.hint
    assert tree(root) == before
    cri["containerd"]["snapshotter"] = "lazyfs"
    installation.carry_out(node, OPTIONS, planned)
    assert manifest.load(node) is not None


def test_programs_that_are_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install", "--root-prefix", str(root), "--prefix", "/usr/local", "--yes"]) == 2
    assert "/usr/local/bin/lazyfsd does not exist" in capsys.readouterr().err
    (root / "opt/lazyfs/bin/lazyfsd").chmod(0o777)
    assert install(root, "--dry-run") == 0
    assert "can be changed by others than root" in capsys.readouterr().err


# -- uninstall: snapshots in use, the store


@pytest.fixture
def store(root: Path) -> Path:
    found = root / "var/lib/lazyfs"
    found.mkdir(parents=True)
    opened = Store(found / "snapshots.db")
    opened.create("k8s.io/7/web-1", "", Kind.ACTIVE, {})
    opened.close()
    return found


def test_snapshots_in_use_stop_it(root: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(root, "--yes") == 0
    after = tree(root / "etc")
    assert uninstall(root, "--yes") == 9
    assert "in use: k8s.io/web-1" in capsys.readouterr().err
    assert tree(root / "etc") == after
    assert uninstall(root, "--yes", "--force") == 0
    assert "k8s.io/web-1" in capsys.readouterr().err
    assert store.is_dir()


def test_records_that_can_not_be_read_stop_it_unless_forced(
    root: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(root, "--yes") == 0
    (store / "snapshots.db").write_bytes(b"no database at all" * 400)
    assert uninstall(root, "--yes") != 0
    assert "--force" in capsys.readouterr().err and manifest.load(Node(root)) is not None
    assert uninstall(root, "--yes", "--force") == 0
    assert "is not known" in capsys.readouterr().err


def test_the_store_goes_only_when_asked_for(root: Path, store: Path) -> None:
    assert install(root, "--yes") == 0
    assert uninstall(root, "--yes", "--force", "--purge") == 0
    assert not store.exists()


def test_another_directory_is_not_purged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = root / "srv/precious"
    precious.mkdir(parents=True)
    (precious / "file").touch()
    (precious / "lock").touch()  # many directories have one
    assert install(root, "--yes", "--root", "/srv/precious") == 0
    assert uninstall(root, "--yes", "--purge") == 2
    assert "does not look like a store" in capsys.readouterr().err
    assert (precious / "file").exists() and manifest.load(Node(root)) is not None


def test_a_manifest_of_somebody_else_is_not_believed(root: Path, node: Node) -> None:
    entry = {"path": "/etc/x", "digest": "", "before": "", "backup": "/etc/shadow", "shared": False}
    node.write(manifest.PATH, json.dumps({"version": 1, "files": [entry], "directories": []}).encode())
    with pytest.raises(UsageError, match="damaged"):
        manifest.load(node)


# -- systemd


@pytest.fixture
def systemctl(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A systemctl that writes down how it is called, and knows no unit until one is enabled."""
    place = tmp_path_factory.mktemp("systemd")
    program = place / "systemctl"
    program.write_text(
        f'#!/bin/sh\necho "$*" >>{place}/calls\n'
        f'case "$1" in is-active|is-enabled) [ -e {place}/on ] && echo "${{1#is-}}" || exit 3;;\n'
        f"enable) touch {place}/on;; disable) rm {place}/on;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setattr(services, "_BOOTED", place)
    monkeypatch.setattr(Node, "is_this", True)
    monkeypatch.setattr(services, "what_containerd_reads", lambda main: None)
    yield place / "calls"


def calls(path: Path) -> list[str]:
    found = [line for line in path.read_text().splitlines() if not line.startswith("is-")]
    path.unlink()
    return found


def test_systemd_is_told(root: Path, systemctl: Path) -> None:
    both = "lazyfsd.service lazyfs-snapshotter.service"
    assert install(root, "--yes") == 0
    assert calls(systemctl) == ["daemon-reload", f"enable --now {both}"]
    assert install(root, "--yes") == 0
    assert calls(systemctl) == []
    assert install(root, "--yes", "--restart-containerd") == 0
    assert calls(systemctl) == []
    unit, config = root / "etc/systemd/system/lazyfs-snapshotter.service", root / "etc/containerd/config.toml"
    unit.write_text("# old\n")
    config.write_text(config.read_text().replace("lazyfs", "other"))
    assert install(root, "--yes", "--restart-containerd") == 0
    assert calls(systemctl) == [
        "daemon-reload", f"enable --now {both}", "restart lazyfs-snapshotter.service", "restart containerd.service",
    ]  # fmt: skip
    unit.write_text("# theirs\n")
    config.write_text(config.read_text().replace('snapshotter = "lazyfs"', 'snapshotter = "overlayfs"'))
    assert uninstall(root, "--yes", "--restart-containerd") == 0
    assert calls(systemctl) == [
        "restart containerd.service",
        "disable --now lazyfs-snapshotter.service lazyfsd.service",
        "daemon-reload",
    ]
    assert unit.exists()


@pytest.mark.parametrize("refused", ["enable", "restart"])
def test_a_step_that_fails_leaves_containerd_as_it_was(
    root: Path, systemctl: Path, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    config = root / "etc/containerd/config.toml"
    program = systemctl.parent / "systemctl"
    good = program.read_text()
    program.write_text(f'{good}[ "$1" = {refused} ] && {{ echo no >&2; exit 1; }}; true\n')
    assert install(root, "--yes", "--restart-containerd") != 0
    assert "no; containerd's configuration was put back" in capsys.readouterr().err
    assert config.read_text() == CONFIG
    program.write_text(good)
    assert install(root, "--yes", "--restart-containerd") == 0  # the rest is done now
    assert 'snapshotter = "lazyfs"' in config.read_text()
    assert uninstall(root, "--yes") == 0
    assert config.read_text() == CONFIG and not (root / "etc/lazyfs").exists()


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = root / "etc/containerd/config.toml"
    config.unlink()
    os.mkfifo(config)
    assert install(root, "--yes") == 2
    assert "config.toml is not a file" in capsys.readouterr().err


FORBIDDEN = {  # each gives the service a mount namespace of its own, and hides the FUSE mount from containerd
    "PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateUsers", "PrivateIPC", "ProtectSystem", "ProtectHome",
    "ProtectProc", "ProcSubset", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs",
    "ProtectControlGroups", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths",
    "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "RootDirectory", "RootImage", "MountFlags", "MountAPIVFS",
    "DynamicUser", "LogNamespace", "LoadCredential", "SetCredential", "StateDirectory", "CacheDirectory",
}  # fmt: skip


@pytest.mark.parametrize("name", units.NAMES)
def test_units_mount_for_the_host_and_spare_what_runs(name: str) -> None:
    text = units.text(name, Path("/opt/lazyfs/bin"))
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")]
    set_to = dict(pairs)
    assert not FORBIDDEN & set(set_to)
    assert set_to["Type"] == "notify" and set_to["Restart"] == "always" and set_to["OOMScoreAdjust"] == "-999"
    assert set_to["RuntimeDirectoryPreserve"] == "yes" and set_to["OOMPolicy"] == "continue"
    assert set_to["ExecStart"].startswith(f"/opt/lazyfs/bin/{name.removesuffix('.service')}")
    assert not {"Requires", "BindsTo", "PartOf", "Conflicts"} & set(set_to)
    assert name == units.NAMES[0] or (set_to["KillMode"] == "process" and "--wait-for-daemon" in set_to["ExecStart"])


def test_the_units_of_the_source_tree_are_these() -> None:
    for name in units.NAMES:
        source = Path(__file__).parents[2] / "deploy" / name
        assert source.read_text() == units.text(name, Path("/usr/local/bin"))
