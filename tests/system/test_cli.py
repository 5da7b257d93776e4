"""The read-only commands as processes, against Debian's registry and an image that skopeo and umoci made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import real
from tests.helpers.fake_registry import FakeRegistry, Fault

_DEADLINE = 120.0  # seconds


class Cli:
    """Runs `lazyfs` with a store, sockets and credentials of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.env = {
            **os.environ,
            "LAZYFS_ROOT": str(place / "root"),
            "LAZYFS_RUN": str(place / "run"),
            "LAZYFS_CONFIG": str(place / "none.toml"),
            "DOCKER_CONFIG": str(place),
        }

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "lazyfs", *words]

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words), env=self.env, capture_output=True, text=True, timeout=_DEADLINE, check=False
        )  # fmt: skip

    def json(self, *words: str, code: int = 0) -> dict[str, Any]:
        done = self(*words, "--json")
        assert done.returncode == code, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def cli(scratch: Path) -> Cli:
    return Cli(scratch)


@pytest.fixture(scope="module")
def lazy_image(docker_registry: real.DockerRegistry, small_image: str) -> Iterator[str]:
    """The small real image, converted through the command line."""
    reference = docker_registry.image("small-cli", "lazy")
    done = subprocess.run(
        [sys.executable, "-m", "lazyfs", "-q", "convert", small_image, reference],
        capture_output=True, text=True, timeout=_DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    yield reference


def test_inspect_agrees_with_skopeo(cli: Cli, small_image: str) -> None:
    told = cli.json("inspect", small_image)
    raw = real.call("skopeo", "inspect", "--tls-verify=false", small_image)
    skopeo = json.loads(raw)
    assert told["digest"] == skopeo["Digest"]
    assert [layer["digest"] for layer in told["layers"]] == skopeo["Layers"]
    assert told["platform"] == f"{skopeo['Os']}/{skopeo['Architecture']}"
    assert [layer["lazy"] for layer in told["layers"]] == [False, False]
    assert all("TOC" in layer["reason"] for layer in told["layers"])


def test_a_converted_image_is_lazy_and_costs_two_round_trips(cli: Cli, lazy_image: str, small_image: str) -> None:
    told = cli.json("inspect", "--timing", lazy_image)
    before = cli.json("inspect", small_image)
    assert told["lazy"] is True
    assert told["config"] == before["config"]
    assert [a["diff_id"] for a in told["layers"]] == [b["diff_id"] for b in before["layers"]]
    assert all(layer["entries"] > 0 for layer in told["layers"])
    assert told["sequential"] == 2
    assert len(told["requests"]) == 1 + 1 + len(told["layers"])


@pytest.mark.parametrize("which", ["lazy", "original"])
def test_verify_passes_what_others_made_and_what_we_made(
    cli: Cli, lazy_image: str, small_image: str, which: str
) -> None:
    told = cli.json("verify", lazy_image if which == "lazy" else small_image)
    assert told["ok"] is True
    assert all(layer["ok"] for layer in told["layers"])


def test_verify_finds_a_byte_changed_in_the_registrys_storage(
    cli: Cli, docker_registry: real.DockerRegistry, lazy_image: str
) -> None:
    layer = max(cli.json("inspect", lazy_image)["layers"], key=lambda each: each["size"])
    name = layer["digest"].removeprefix("sha256:")
    (blob,) = (docker_registry.log.parent / "blobs").glob(f"docker/registry/v2/blobs/sha256/*/{name}/data")
    with blob.open("r+b") as handle:
        handle.seek(layer["size"] // 2)
        byte = handle.read(1)
        try:
            handle.seek(layer["size"] // 2)
            handle.write(bytes([byte[0] ^ 1]))
            handle.flush()
            done = cli("verify", lazy_image)
            assert done.returncode == 6
            assert f"{layer['digest']}  WRONG: " in done.stdout
        finally:
            handle.seek(layer["size"] // 2)
            handle.write(byte)
    assert cli("verify", lazy_image).returncode == 0


def test_verify_takes_bounded_memory(cli: Cli, lazy_image: str) -> None:
    """About 90 MB unpacked, checked by a process that has little more than its interpreter needs."""
    code = (
        "import re, sys\n"
        "from lazyfs.cli.main import main\n"
        "code = main(['-q', 'verify', sys.argv[1]])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, lazy_image], env=cli.env, capture_output=True, text=True, timeout=_DEADLINE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) < 80_000, "KiB"


def test_doctor_finds_the_registry_fit(cli: Cli, lazy_image: str) -> None:
    done = cli("doctor", lazy_image, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in ("kernel", "registry", "image", "layers", "ranges"):
        assert checks[name]["state"] == "ok", checks[name]
    assert done.returncode == (8 if any(check["state"] == "fail" for check in checks.values()) else 0)


def test_status_without_a_daemon(cli: Cli) -> None:
    done = cli("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no daemon is running")
    assert list(cli.place.iterdir()) == []


def test_errors_are_sentences_and_codes(cli: Cli, docker_registry: real.DockerRegistry, small_image: str) -> None:
    for words, code in (
        (("inspect", docker_registry.image("small", "missing")), 3),
        (("verify", f"docker://127.0.0.1:{real.free_port()}/x:1"), 5),
        (("verify", "--platform", "linux/s390x", "oci:/does/not/exist:x"), 3),
        (("inspect", "docker://UPPER/case:1"), 2),
        (("inspect",), 2),
        (("frobnicate",), 2),
    ):
        done = cli(*words)
        assert (done.returncode, done.stdout) == (code, ""), (words, done.returncode, done.stderr)
        assert done.stderr.startswith("lazyfs: ") and "Traceback" not in done.stderr and "bug" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_waits_for_a_dead_registry_can_be_stopped(cli: Cli, number: signal.Signals, code: int) -> None:
    with FakeRegistry() as registry:
        image = registry.add_image("app", "1", [b"\0" * 10240])
        registry.fault(Fault.BLACK_HOLE, path="/blobs/")
        with subprocess.Popen(
            cli.argv("verify", image.reference), env=cli.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            registry.wait_for(2)
            child.send_signal(number)
            out, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert b"Traceback" not in err and out == b""
