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
from tests.helpers.certs import Pair, TestAuthority
from tests.helpers.daemon import Node, pattern
from tests.helpers.front import demanding_nginx
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
