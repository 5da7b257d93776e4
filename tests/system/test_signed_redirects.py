"""An nginx that asks for a login and answers with signed redirects to another host and port, both with TLS."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lazyfs.digest import of
from tests.helpers import real
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.certs import TestAuthority, server_context
from tests.helpers.daemon import Node, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.front import Front, front
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

USER, PASSWORD = "alice", "hunter2-correct-horse"
FILES = {f"f{number}": pattern(2_000_000, number) for number in range(8)}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> TestAuthority:
    return TestAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory, authority: TestAuthority) -> Iterator[Front]:
    place = tmp_path_factory.mktemp("front")
    with real.docker_registry(place / "registry") as registry:
        _push(place, registry)
        with front(place / "nginx", registry, authority.issue(), {USER: PASSWORD}) as running:
            yield running


def _push(place: Path, registry: real.DockerRegistry) -> None:
    """Bring a lazy image into the registry by way of a layout that we convert."""
    tar = place / "layer.tar"
    tar.write_bytes(tar_of(*(file(name, data) for name, data in FILES.items())))
    reference = real.build_layout(place / "layout", "plain", [tar])
    with Node(place / "node") as node:
        done = node.lazyfs("convert", reference, registry.image("team/app"))
        assert done.returncode == 0, done.stderr


@pytest.fixture
def node(scratch: Path, authority: TestAuthority, fronted: Front) -> Iterator[Node]:
    auths = scratch / "auth.json"
    (scratch / "creds").write_text(f"{USER}:{PASSWORD}\n")
    auths.write_text("{}")
    fronted.lifetime = 3600
    certs = scratch / "certs.d" / fronted.host
    certs.mkdir(parents=True)
    (certs / "hosts.toml").write_text(f'server = "https://{fronted.host}"\nca = "{authority.certificate}"\n')
    with Node(scratch, CERTS_DIR=str(scratch / "certs.d")) as running:
        yield running


def expired(url: str, authority: TestAuthority) -> bool:
    """Tell whether the storage refuses a signed address by now."""
    import ssl

    context = ssl.create_default_context(cafile=str(authority.certificate))
    request = urllib.request.Request(url, method="HEAD")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        opener.open(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        error.close()
        assert error.code == 410
        return True
    return False


def test_reads_go_on_when_addresses_expire_and_the_login_stays_at_home(
    node: Node, fronted: Front, authority: TestAuthority, scratch: Path
) -> None:
    fronted.lifetime = 1
    tree = node.mount(f"docker://{fronted.host}/team/app:latest", "--creds-file", str(scratch / "creds"))
    assert node.read(tree / "f0") == FILES["f0"]
    given = len(fronted.signed)
    assert given >= 1
    for name in ("f5", "f2", "f7"):  # far apart: not fetched along with another
        last = fronted.signed[-1]
        until(lambda last=last: expired(last, authority), "the signed address has expired")
        assert node.read(tree / name) == FILES[name]
        assert len(fronted.signed) > given
        given = len(fronted.signed)
    stored = [line for line in fronted.at(fronted.storage) if line[1] == "GET"]
    assert {"206", "410"} <= {line[4] for line in stored}  # the expired address was tried, and replaced
    assert all(line[5] == "-" for line in stored)  # no Authorization
    assert all(line[7].startswith("TLS") for line in stored)
    home = fronted.at(fronted.host)
    assert any(line[5].startswith("Basic ") for line in home)
    for place in (node.root, node.run_dir):  # nor is it on disk or in a log
        for path in place.rglob("*"):
            if path.is_file():
                assert PASSWORD.encode() not in path.read_bytes(), path


def test_a_lasting_address_is_asked_for_once(node: Node, fronted: Front, scratch: Path) -> None:
    tree = node.mount(f"docker://{fronted.host}/team/app:latest", "--creds-file", str(scratch / "creds"))
    assert node.read(tree / "f4") == FILES["f4"]
    given = len(fronted.signed)
    assert node.read(tree / "f5") == FILES["f5"]
    assert node.read(tree / "f0") == FILES["f0"]
    assert len(fronted.signed) == given
    paths = {urlsplit(url).path for url in fronted.signed}
    assert all(path.endswith("/data") for path in paths)


def test_without_a_login_or_without_the_authority_it_is_one_sentence(node: Node, fronted: Front, scratch: Path) -> None:
    image = f"docker://{fronted.host}/team/app:latest"
    none = str(scratch / "auth.json")
    words = node.refused(4, "mount", "--authfile", none, image, node.new_dir())
    assert f"{fronted.host} refused" in words and "no credentials" in words and "docker, podman or skopeo" in words
    (scratch / "wrong").write_text(f"{USER}:no\n")
    words = node.refused(4, "mount", "--creds-file", str(scratch / "wrong"), image, node.new_dir())
    assert "from the command line" in words and ":no" not in words
    (scratch / "certs.d" / fronted.host / "hosts.toml").unlink()
    words = node.refused(5, "mount", "--no-plain-http", image, node.new_dir())
    assert "authority that is not trusted here" in words and "--tls-ca" in words


def test_doctor_tells_of_the_endpoint(node: Node, fronted: Front, scratch: Path) -> None:
    auths = {fronted.host: {"username": USER, "password": PASSWORD}}
    (scratch / "auth.json").write_text(json.dumps({"auths": auths}))
    done = node.lazyfs(
        "doctor", "--authfile", scratch / "auth.json", f"docker://{fronted.host}/team/app:latest", "--json"
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    text = checks["endpoint"]["text"]
    assert f"https://{fronted.host}/v2/team/app; from {scratch}/certs.d/" in text
    assert "also trusting" in text and f"the login for {fronted.host} from {scratch}/auth.json" in text
    assert PASSWORD not in done.stdout + done.stderr
    assert checks["registry"]["state"] == checks["ranges"]["state"] == "ok"


def test_a_login_that_changes_during_a_mount(scratch: Path, authority: TestAuthority) -> None:
    """The daemon reads the command's own file again when the registry refuses what it said before."""
    layer = zstd_chunked_layer(tar_of(*(file(name, data) for name, data in FILES.items())))
    with FakeRegistry(auth="basic", users={USER: "old"}, tls=server_context(authority.issue())) as registry:
        image = registry.add_image("app", "1", [(layer.blob, dict(layer.annotations), layer.media_type)])
        login = scratch / "auth.json"
        login.write_text(json.dumps({"auths": {registry.host: {"username": USER, "password": "old"}}}))
        with Node(scratch) as node:
            tree = node.mount(image.reference, "--authfile", str(login), "--tls-ca", str(authority.certificate))
            assert node.read(tree / "f0") == FILES["f0"]
            registry.users[USER] = "new"
            login.write_text(json.dumps({"auths": {registry.host: {"username": USER, "password": "new"}}}))
            assert node.read(tree / "f5") == FILES["f5"]
        assert of(layer.blob) == image.layers[0]
