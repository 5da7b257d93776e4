"""Debian's docker-registry as companies run it: TLS of their own authority, a login, client certificates, a mirror."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import real
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.certs import Pair, TestAuthority
from tests.helpers.daemon import Node, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.front import demanding_nginx
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

USER, PASSWORD = "alice", "hunter2-correct-horse"
BCRYPT = "$2b$04$6xfXGYp/2M6A1ZoQ57iRLuvW7mnrWqheBPE58FeIjdb50/rokAbxq"  # of PASSWORD
CONTENT = pattern(600_000)


@dataclass(frozen=True, slots=True)
class Company:
    """A running registry and what its clients need."""

    host: str
    authority: TestAuthority
    client: Pair
    layout: str  # an image to push there


@contextlib.contextmanager
def company_registry(place: Path, authority: TestAuthority, client: Pair, layout: str) -> Iterator[Company]:
    pair, port = authority.issue(), real.free_port()
    (place / "htpasswd").write_text(f"{USER}:{BCRYPT}\n")
    (place / "config.yml").write_text(
        "version: 0.1\n"
        "log: {level: info}\n"
        f"storage: {{filesystem: {{rootdirectory: {place / 'blobs'}}}}}\n"
        f"auth: {{htpasswd: {{realm: company, path: {place / 'htpasswd'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', tls: {{certificate: {pair.certificate}, key: {pair.key}, "
        f"clientcas: [{authority.certificate}]}}}}\n"
    )
    with (place / "log").open("ab") as sink:
        process = subprocess.Popen(
            [real.tool("docker-registry"), "serve", str(place / "config.yml")],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + real.START
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()[-2000:]
            time.sleep(0.02)
        yield Company(f"127.0.0.1:{port}", authority, client, layout)
    finally:
        real.stop(process)


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    place = tmp_path_factory.mktemp("company")
    authority = TestAuthority(place / "authority")
    (place / "layer.tar").write_bytes(tar_of(file("data", CONTENT)))
    layout = real.build_layout(place / "layout", "plain", [place / "layer.tar"])
    with company_registry(place, authority, authority.issue("DNS:client.example"), layout) as running:
        yield running


@pytest.fixture
def node(scratch: Path, company: Company) -> Iterator[Node]:
    (scratch / "creds").write_text(f"{USER}:{PASSWORD}\n")
    with Node(scratch, CERTS_DIR=str(scratch / "certs.d")) as running:
        yield running


def flags(company: Company) -> list[str]:
    return [
        "--tls-ca", str(company.authority.certificate),
        "--tls-cert", str(company.client.certificate), "--tls-key", str(company.client.key),
    ]  # fmt: skip


def test_convert_push_mount_and_verify_with_flags(node: Node, company: Company, scratch: Path) -> None:
    image = f"docker://{company.host}/team/app:lazy"
    creds = str(scratch / "creds")
    done = node.lazyfs("convert", *flags(company), "--dest-creds-file", creds, company.layout, image)
    assert done.returncode == 0, done.stderr
    done = node.lazyfs("verify", *flags(company), "--creds-file", creds, image)
    assert done.returncode == 0, done.stderr
    tree = node.mount(image, *flags(company), "--creds-file", creds)
    assert node.read(tree / "data") == CONTENT


def test_mount_by_the_nodes_own_files(node: Node, company: Company, scratch: Path) -> None:
    """A hosts.toml of containerd's and a credential program, and no flag at all but where the logins are."""
    image = f"docker://{company.host}/team/files:lazy"
    certs = scratch / "certs.d" / company.host.replace(":", "_").join(("", "_"))
    certs.mkdir(parents=True)
    (certs / "hosts.toml").write_text(
        f'server = "https://{company.host}"\nca = "{company.authority.certificate}"\n'
        f'client = [["{company.client.certificate}", "{company.client.key}"]]\n'
    )
    program = scratch / "bin/docker-credential-company"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nread -r server\n[ "$server" = {company.host} ] || {{ echo "credentials not found"; exit 1; }}\n'
        f"""printf '{{"Username": "{USER}", "Secret": "{PASSWORD}"}}'\n"""
    )
    program.chmod(0o755)
    logins = scratch / "auth.json"
    logins.write_text(json.dumps({"credHelpers": {company.host: "company"}}))
    node.prefix = ("env", f"PATH={program.parent}:/usr/sbin:/usr/bin:/sbin:/bin")
    done = node.lazyfs("convert", "--authfile", logins, company.layout, image)
    assert done.returncode == 0, done.stderr
    tree = node.mount(image, "--authfile", str(logins))
    assert node.read(tree / "data") == CONTENT


def test_a_mirror_without_login_before_the_company(node: Node, company: Company, scratch: Path) -> None:
    """The mirror has the blobs; the company is asked for what the mirror lacks, with its own certificates and login."""
    creds = str(scratch / "creds")
    image = f"docker://{company.host}/team/mirrored:lazy"
    done = node.lazyfs("convert", *flags(company), "--dest-creds-file", creds, company.layout, image)
    assert done.returncode == 0, done.stderr
    with real.docker_registry(scratch / "mirror") as mirror:
        done = node.lazyfs("convert", company.layout, mirror.image("team/mirrored", "lazy"))
        assert done.returncode == 0, done.stderr
        certs = scratch / "certs.d" / company.host
        certs.mkdir(parents=True)
        (certs / "hosts.toml").write_text(
            f'server = "https://{company.host}"\nca = "{company.authority.certificate}"\n'
            f'client = [["{company.client.certificate}", "{company.client.key}"]]\n'
            f'[host."http://{mirror.host}"]\ncapabilities = ["pull"]\n'
        )
        tree = node.mount(image, "--creds-file", creds)
        assert node.read(tree / "data") == CONTENT
        asked = mirror.log.read_text()
        assert f"ns={company.host.replace(':', '%3A')}" in asked and "/blobs/sha256:" in asked
        assert "authorization" not in asked.lower()


def test_a_mirror_that_pulls_through(company: Company, scratch: Path) -> None:
    """Debian's registry as a cache: it answers a range of a blob that it has not got with the whole blob.

    The origin gives that range, the cache fills meanwhile, and the next node gets every byte of its layer there.
    """
    with (
        real.docker_registry(scratch / "origin") as origin,
        real.docker_registry(scratch / "through", extra=f"proxy: {{remoteurl: 'http://{origin.host}'}}\n") as mirror,
    ):
        image = origin.image("team/app", "lazy")
        certs = scratch / "certs.d" / origin.host
        certs.mkdir(parents=True)
        (certs / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\ncapabilities = ["pull", "resolve"]\n')
        for name in ("first", "second"):
            (scratch / name).mkdir()
            with Node(scratch / name, CERTS_DIR=str(certs.parent)) as node:
                if name == "first":
                    done = node.lazyfs("convert", company.layout, image)
                    assert done.returncode == 0, done.stderr
                origin_was, mirror_was = len(origin.log.read_text()), len(mirror.log.read_text())
                assert node.read(node.mount(image) / "data") == CONTENT
                asked = origin.log.read_text()[origin_was:]
                if name == "first":
                    blob = max((scratch / "origin/blobs").rglob("data"), key=lambda path: path.stat().st_size)
                    copy = scratch / "through/blobs" / blob.relative_to(scratch / "origin/blobs")
                    until(copy.exists, "the cache has the layer")
                else:
                    assert '"lazyfs/' not in asked, asked
                    assert '" 206 ' in mirror.log.read_text()[mirror_was:]


def test_podmans_mirror_and_login(scratch: Path) -> None:
    """registries.conf and $REGISTRY_AUTH_FILE are the command's, and hold for the daemon that it starts."""
    halves = {"one": pattern(1_500_000, 1), "two": pattern(1_500_000, 2)}
    layer = zstd_chunked_layer(tar_of(*(file(name, data) for name, data in halves.items())))
    parts = [(layer.blob, dict(layer.annotations), layer.media_type)]
    with FakeRegistry(auth="basic", users={USER: PASSWORD}) as origin, FakeRegistry() as mirror, Node(scratch) as node:
        reference = origin.add_image("team/app", "1", parts).reference
        mirror.add_image("cached/app", "1", parts)
        conf, auth = scratch / "registries.conf", scratch / "auth.json"
        conf.write_text(
            f'[[registry]]\nprefix = "{origin.host}/team"\nlocation = "{origin.host}/team"\n'
            f'[[registry.mirror]]\nlocation = "{mirror.host}/cached"\n'
        )
        auth.write_text(json.dumps({"auths": {origin.host: {"username": USER, "password": PASSWORD}}}))
        node.prefix = ("env", f"CONTAINERS_REGISTRIES_CONF={conf}", f"REGISTRY_AUTH_FILE={auth}")
        tree = node.mount(reference)
        assert node.read(tree / "one") == halves["one"]
        assert origin.count() == 0 and mirror.count() > 0
        assert not any(request.authorization for request in mirror.requests)
        mirror.stop_listening()
        assert node.read(tree / "two") == halves["two"]
        assert any(request.authorization for request in origin.requests)
        node.prefix = ("env", f"CONTAINERS_REGISTRIES_CONF={conf}", f"REGISTRY_AUTH_FILE={scratch}/none")
        assert node.lazyfs("verify", "--creds", f"{USER}:{PASSWORD}", reference).returncode == 0


def test_what_is_missing_is_one_sentence(node: Node, company: Company, scratch: Path) -> None:
    image = f"docker://{company.host}/team/app:none"
    creds = ["--creds-file", str(scratch / "creds")]
    authority, certificate, key = flags(company)[:2], flags(company)[2:4], flags(company)[4:]
    refused = node.refused(5, "verify", "--no-plain-http", *certificate, *key, *creds, image)
    assert f"the certificate of {company.host} comes from an authority that is not trusted here" in refused
    refused = node.refused(5, "verify", *authority, *creds, image)
    assert "client certificate" in refused and "--tls-cert" in refused
    refused = node.refused(4, "verify", *flags(company), image)
    assert f"{company.host} refused" in refused and "no credentials" in refused
    refused = node.refused(3, "verify", *flags(company), *creds, image)
    assert "has no manifest" in refused
    refused = node.refused(2, "verify", *key, *creds, image)
    assert "--tls-key needs --tls-cert" in refused
    refused = node.refused(2, "verify", "--creds", "nocolon", image)
    assert "--creds does not hold USER:PASSWORD" in refused and "nocolon" not in refused
    refused = node.refused(2, "verify", "--authfile", str(scratch / "none.json"), *flags(company), image)
    assert "none.json: there is no such file" in refused
    refused = node.refused(5, "verify", *authority, *certificate, "--tls-key", str(scratch / "creds"), *creds, image)
    assert "can't be loaded" in refused


def test_an_nginx_that_wants_certificates_says_so_after_the_handshake(company: Company, scratch: Path) -> None:
    authority, client = company.authority, company.client
    other = TestAuthority(scratch / "other", "Other").issue()
    with demanding_nginx(scratch / "nginx", authority.issue(), authority.certificate) as host, Node(scratch) as node:
        image = f"docker://{host}/team/app:none"
        trusted = ["--tls-ca", str(authority.certificate)]
        for pair in (None, other):
            shown = ["--tls-cert", str(pair.both)] if pair else []
            refused = node.refused(4, "verify", *trusted, *shown, image)
            assert f"{host} wants a client certificate that it trusts" in refused and "--tls-cert" in refused
        refused = node.refused(3, "verify", *trusted, "--tls-cert", str(client.both), image)
        assert "has no manifest" in refused
