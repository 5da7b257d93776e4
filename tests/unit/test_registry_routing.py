"""Mirrors as containerd's and podman's files name them: who is asked, in which order, how; and malformed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import reference
from lazyfs.digest import of
from lazyfs.errors import UsageError
from lazyfs.registry.config.access import Access, Login, from_environment, from_json, parse_login
from lazyfs.registry.config.config_files import Section
from lazyfs.registry.config.hosts_toml import find_host_rules, split_server
from lazyfs.registry.config.registries_conf import read_registries_conf
from lazyfs.registry.config.routing import find_endpoints
from lazyfs.registry.endpoints import Endpoint, Tls
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from tests.helpers.fake_registry import FakeRegistry

IMAGE = "registry.example:5000/team/app:1"


def hosts(place: Path, text: str, host: str = "registry.example:5000") -> Access:
    (place / host).mkdir(parents=True)
    (place / host / "hosts.toml").write_text(text)
    return Access(certs_dirs=(place,))


def conf(place: Path, text: str) -> Access:
    path = place / "registries.conf"
    path.write_text(text)
    return Access(registries_conf=(path,))


def found(access: Access, image: str = IMAGE, plain_http: bool | None = None) -> tuple[Endpoint, ...]:
    return find_endpoints(reference.parse(image), access, plain_http)


# -- nothing configured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "plain_http", "api"),
    [
        (IMAGE, None, "https://registry.example:5000/v2"),
        (IMAGE, True, "http://registry.example:5000/v2"),
        ("debian", None, "https://registry-1.docker.io/v2"),
        ("localhost:5000/a", None, "http://localhost:5000/v2"),
        ("127.0.0.1:5000/a", False, "https://127.0.0.1:5000/v2"),
    ],
)
def test_without_files_there_is_the_origin_alone(image: str, plain_http: bool | None, api: str) -> None:
    (origin,) = found(Access(), image, plain_http)
    assert origin.api == api and origin.origin and origin.can_push and not origin.namespace and not origin.source


# -- hosts.toml --------------------------------------------------------------------------------------------------------

FULL = """\
server = "https://registry.example:5000"
ca = "own.pem"

[host."https://zz.example"]
capabilities = ["pull", "resolve"]
ca = ["/etc/one.pem", "two.pem"]
client = [["a.cert", "a.key"], ["/b.pem", ""]]
dial_timeout = "1500ms"
[host."https://zz.example".header]
x-team = ["a", "b"]
X-One = "c"

[host."http://aa.example:8080/proxy/registry.example"]
capabilities = ["pull"]
override_path = true
skip_verify = true

[host."mm.example/hub"]
"""


def test_every_field_of_a_hosts_file(tmp_path: Path) -> None:
    first, second, third, origin = found(hosts(tmp_path, FULL))
    base = tmp_path / "registry.example:5000"
    assert first == Endpoint(
        "https://zz.example/v2", "zz.example", "team/app", "zz.example", namespace="registry.example:5000",
        headers=(("x-team", "a, b"), ("X-One", "c")), connect_timeout=1.5, source=str(base / "hosts.toml"),
        tls=Tls((Path("/etc/one.pem"), base / "two.pem"), ((base / "a.cert", base / "a.key"), (Path("/b.pem"), None))),
    )  # fmt: skip
    assert second.api == "http://aa.example:8080/proxy/registry.example"
    assert (second.can_pull, second.can_resolve, second.can_push) == (True, False, False)
    assert second.tls.skip_verify and second.host == "aa.example:8080"
    assert third.api == "https://mm.example/hub/v2" and third.can_push
    assert origin.api == "https://registry.example:5000/v2" and origin.origin and not origin.namespace
    assert origin.tls.ca == (base / "own.pem",)


def test_docker_hub_is_the_server_under_both_names(tmp_path: Path) -> None:
    text = 'server = "https://registry-1.docker.io"\n[host."https://m.example"]\n'
    mirror, origin = found(hosts(tmp_path, text, "docker.io"), "debian")
    assert mirror.namespace == "docker.io" and mirror.repository == "library/debian"
    assert origin.credentials_host == origin.host == "docker.io" and not origin.namespace


def test_another_server_takes_the_registrys_place(tmp_path: Path) -> None:
    (origin,) = found(hosts(tmp_path, 'server = "https://new.example"'))
    assert origin.api == "https://new.example/v2" and origin.origin
    assert (origin.credentials_host, origin.namespace) == ("new.example", "registry.example:5000")


@pytest.mark.parametrize("directory", ["registry.example_5000_", "registry.example:5000"])
def test_the_names_of_a_hosts_directory(tmp_path: Path, directory: str) -> None:
    assert len(found(hosts(tmp_path, '[host."https://m.example"]', directory))) == 2
    assert len(found(Access(certs_dirs=(tmp_path,)), "registry.example/team/app:1")) == 1


def test_dockers_certificates_in_containerds_directory(tmp_path: Path) -> None:
    place = tmp_path / "registry.example:5000"
    place.mkdir()
    for name in ("ca.crt", "c.cert", "c.key"):
        (place / name).touch()
    (origin,) = found(Access(certs_dirs=(tmp_path,)))
    assert origin.tls == Tls((place / "ca.crt",), ((place / "c.cert", place / "c.key"),))
    (place / "c.key").unlink()
    with pytest.raises(UsageError, match=r"c\.cert without c\.key"):
        found(Access(certs_dirs=(tmp_path,)))


def test_the_order_of_the_files(tmp_path: Path) -> None:
    """The registry's own hosts.toml, then registries.conf, then _default."""
    default = hosts(tmp_path / "certs", '[host."https://default.example"]', "_default")
    podman = conf(
        tmp_path, '[[registry]]\nlocation = "registry.example:5000"\n[[registry.mirror]]\nlocation = "p.example"'
    )
    both = Access(certs_dirs=default.certs_dirs, registries_conf=podman.registries_conf)
    assert found(default)[0].host == "default.example"
    assert found(both)[0].host == "p.example"
    hosts(tmp_path / "certs", '[host."https://own.example"]')
    assert found(both)[0].host == "own.example"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server = 5", "server is no text"),
        ('server = "ftp://x"', "server is no http"),
        ('server = "https://u:p@x"', "server is no http"),
        ('server = "https://x/../y"', "server is no http"),
        ('[host."https://a b"]', "is no http or https URL"),
        ('[host.""]', "is no http or https URL"),
        ("host = 5", "host is no table"),
        ('[host]\n"https://x" = 5', "is no table"),
        ('[host."https://x"]\ncapabilities = ["fly"]', "capabilities knows pull"),
        ('[host."https://x"]\ncapabilities = "pull"', "capabilities is no list"),
        ('[host."https://x"]\nca = 5', "ca is no list"),
        ('[host."https://x"]\nca = ""', "ca holds an empty path"),
        ('[host."https://x"]\nclient = [["a", "b", "c"]]', "client is no certificate"),
        ('[host."https://x"]\nskip_verify = "yes"', "skip_verify is neither"),
        ('[host."https://x"]\ndial_timeout = "soon"', "dial_timeout is no duration"),
        ('[host."https://x".header]\nx = "a\\r\\nAuthorization: b"', "header.x is no HTTP header"),
        ('[host."https://x".header]\n"a b" = "c"', "is no HTTP header"),
        ('[host."https://x".header]\nhost = "c"', "can't be set"),
        ('[host."https://x".header]\nx = 5', "header.x is no list"),
        ("server = ", "is not TOML"),
        ("a = " + "[" * 20_000, "is not TOML"),
        ("\xff", "is not TOML"),
        ("\n".join(f'[host."https://h{number}"]' for number in range(40)), "host has more than"),
        ("#" * 300_000, "more than the"),
    ],
)
def test_a_malformed_hosts_file_is_named_with_the_key(tmp_path: Path, text: str, words: str) -> None:
    access = Access(certs_dirs=(tmp_path,))
    (tmp_path / "registry.example:5000").mkdir()
    path = tmp_path / "registry.example:5000/hosts.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        found(access)
    assert str(path) in caught.value.message and words in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_no_bytes_break_the_parsers(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    place = tmp_path_factory.mktemp("any")
    (place / "h").mkdir()
    for path in (place / "h/hosts.toml", place / "registries.conf"):
        path.write_bytes(raw)
    for read in (lambda: find_host_rules(place, "h"), lambda: read_registries_conf((place / "registries.conf",))):
        try:
            read()
        except UsageError as error:
            assert str(place) in error.message


_VALUES: Any = st.recursive(
    st.none().map(lambda _: 1) | st.booleans() | st.text(max_size=20) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_KEYS = st.sampled_from(
    (
        *("server", "capabilities", "ca", "client", "header", "override_path", "skip_verify", "dial_timeout"),
        *("prefix", "location", "insecure", "blocked", "mirror", "mirror-by-digest-only", "pull-from-mirror"),
    )
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=6), _VALUES)
def test_any_value_under_any_key_is_taken_or_refused_in_a_sentence(values: dict[str, Any], host: Any) -> None:
    from lazyfs.registry.config import hosts_toml, registries_conf

    path = Path("/x/hosts.toml")
    for parse in (
        lambda: hosts_toml._parse(Section(path, {**values, "host": {"https://m.example": values}})),
        lambda: hosts_toml._parse(Section(path, {**values, "host": host})),
        lambda: registries_conf._rule(Section(path, values)),
        lambda: registries_conf._version_1(Section(path, {"registries": host})),
    ):
        try:
            parse()
        except UsageError as error:
            assert str(path) in error.message


@given(st.text(max_size=60))
def test_a_server_is_an_address_and_nothing_more(text: str) -> None:
    split = split_server(text)
    if split is not None:
        api, host = split
        assert api.startswith(("http://" + host, "https://" + host)) and api.endswith("/v2")
        assert not set(api) & set(" \r\n\t#?@") and ".." not in api.split("/")


# -- registries.conf ---------------------------------------------------------------------------------------------------

PODMAN = """\
unqualified-search-registries = ["docker.io"]
[[registry]]
prefix = "registry.example:5000/team"
location = "real.example/groups/team"
[[registry.mirror]]
location = "one.example/cache"
[[registry.mirror]]
location = "two.example"
insecure = true
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "three.example"
pull-from-mirror = "tag-only"
[[registry]]
location = "registry.example:5000"
blocked = true
[[registry]]
prefix = "*.corp.example"
location = "gate.example/corp"
[[registry]]
prefix = "*.wild.example"
insecure = true
[aliases]
debian = "docker.io/library/debian"
"""


def test_every_field_of_registries_conf(tmp_path: Path) -> None:
    access = conf(tmp_path, PODMAN)
    one, two, three, origin = found(access)
    assert (one.api, one.repository, one.can_push) == ("https://one.example/v2", "cache/app", False)
    assert two.may_be_plain and two.tls.skip_verify and not two.can_resolve and two.can_pull
    assert three.repository == "app" and not three.namespace
    assert (origin.api, origin.repository, origin.can_push) == ("https://real.example/v2", "groups/team/app", True)
    digest = "registry.example:5000/team/app@sha256:" + "0" * 64
    assert [endpoint.host for endpoint in found(access, digest)] == ["one.example", "two.example", "real.example"]
    with pytest.raises(UsageError, match=r"registry.example:5000/other/app is blocked by .*registries\.conf"):
        found(access, "registry.example:5000/other/app:1")
    (remapped,) = found(access, "a.corp.example/x/y:1")
    assert (remapped.host, remapped.repository) == ("gate.example", "corp/x/y")
    (wild,) = found(access, "b.wild.example/x:1")
    assert wild.host == "b.wild.example" and wild.may_be_plain
    (none,) = found(access, "wild.example/x:1")
    assert not none.source


def test_a_prefix_ends_at_a_part_of_the_name(tmp_path: Path) -> None:
    access = conf(tmp_path, '[[registry]]\nprefix = "registry.example:5000/team/ap"\nlocation = "m.example"\n')
    assert found(access)[0].host == "registry.example:5000"


def test_blocked_holds_though_containerd_has_a_mirror(tmp_path: Path) -> None:
    blocking = conf(tmp_path, '[[registry]]\nlocation = "registry.example:5000"\nblocked = true\n')
    access = hosts(tmp_path / "certs", '[host."https://m.example"]')
    with pytest.raises(UsageError, match="blocked"):
        found(Access(certs_dirs=access.certs_dirs, registries_conf=blocking.registries_conf))


def test_later_files_override_earlier_ones_by_prefix(tmp_path: Path) -> None:
    access = conf(tmp_path, '[[registry]]\nlocation = "registry.example:5000"\nblocked = true\n')
    more = tmp_path / "registries.conf.d"
    more.mkdir()
    (more / "10.conf").write_text('credential-helpers = ["one"]\n[[registry]]\nlocation="registry.example:5000"\n')
    (more / "20.conf").write_text('credential-helpers = ["two", "containers-auth.json"]\n')
    (more / "30.conf.bak").write_text("not read")
    (more / "40.conf").write_text('# nothing of use\n[aliases]\n"registry" = "docker.io/library/registry"\nbroken')
    access = Access(registries_conf=(*access.registries_conf, more, tmp_path / "absent.d"))
    assert len(found(access)) == 1
    assert read_registries_conf(access.registries_conf).helpers == ("two", "containers-auth.json")


def test_the_lists_of_version_1(tmp_path: Path) -> None:
    access = conf(
        tmp_path, '[registries.insecure]\nregistries = ["a.example"]\n[registries.block]\nregistries=["b.example"]'
    )
    assert found(access, "a.example/x:1")[0].may_be_plain
    with pytest.raises(UsageError, match="blocked"):
        found(access, "b.example/x:1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("registry = [5]", "registry is no array"),
        ("registry = []\nregistry = {}", "is not TOML"),
        ("[[registry]]\n", "registry[0].location is missing"),
        ('[[registry]]\nprefix = "a.example"\n', "location is missing"),
        ('[[registry]]\nlocation = "https://a.example"\n', "has a scheme"),
        ('[[registry]]\nlocation = "a b"\n', "location is no HOST"),
        ('[[registry]]\nlocation = "a.example"\nprefix = "?"\n', "prefix is neither"),
        ('[[registry]]\nlocation = "a.example"\ninsecure = 1\n', "insecure is neither"),
        ('[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\n', "mirror[0].location is missing"),
        ('[[registry]]\nlocation = "a"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = "b"\n'
         'pull-from-mirror = "all"', "can't be set where"),
        ('[[registry]]\nlocation = "a"\n[[registry.mirror]]\nlocation = "b"\npull-from-mirror = "x"', "is none of"),
        ("credential-helpers = [5]", "credential-helpers is no list"),
    ],
)  # fmt: skip
def test_a_malformed_registries_conf_is_named_with_the_key(tmp_path: Path, text: str, words: str) -> None:
    access = conf(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        found(access)
    assert str(tmp_path / "registries.conf") in caught.value.message and words in caught.value.message


# -- flags -------------------------------------------------------------------------------------------------------------


def test_flags_hold_for_the_origin_and_authorities_for_all(tmp_path: Path) -> None:
    access = Access(
        certs_dirs=hosts(tmp_path, '[host."https://m.example"]').certs_dirs,
        ca=(Path("/ca.pem"),),
        client=(Path("/c.pem"), None),
        skip_verify=True,
    )
    mirror, origin = found(access, plain_http=True)
    assert mirror.tls == Tls((Path("/ca.pem"),)) and mirror.api.startswith("https:")
    assert origin.tls == Tls((Path("/ca.pem"),), ((Path("/c.pem"), None),), True) and origin.api.startswith("http:")


def test_access_travels_as_json(tmp_path: Path) -> None:
    access = Access(
        Login("u", "p:w"), (Path("/a"),), True, (Path("/b"),), (Path("/c"),), (Path("/d"),), (Path("/e"),),
        (Path("/f"), Path("/g")), True, (("HOME", "/h"),),
    )  # fmt: skip
    assert from_json(json.loads(json.dumps(access.to_json()))) == access
    assert from_json(json.loads(json.dumps(Access().to_json()))) == Access()
    real = from_environment({"HOME": str(tmp_path), "PATH": "/bin", "SECRET": "x", "AWS_PROFILE": "p"})
    assert from_json(json.loads(json.dumps(real.to_json()))) == real
    assert dict(real.environment) == {"HOME": str(tmp_path), "PATH": "/bin", "AWS_PROFILE": "p"}
    assert "p:w" not in repr(access)


def test_an_environment_of_any_size_fits_the_control_socket() -> None:
    long = {f"AWS_{number}": "x" * (number * 500) for number in range(200)}
    kept = from_environment({"HOME": "/h", "PATH": "/bin", **long})
    assert len(json.dumps(kept.to_json())) < 512 << 10
    assert all(len(value) <= 16 << 10 for _, value in kept.environment)


@given(_VALUES)
def test_no_document_breaks_the_daemons_reading(document: Any) -> None:
    for value in (document, {"login": document}, {"client": document}, {"ca": document}, {"environment": document}):
        try:
            from_json(value)
        except UsageError as error:
            assert "`access`" in error.message


def test_which_files_an_environment_means(tmp_path: Path) -> None:
    plain = from_environment({"HOME": str(tmp_path)})
    assert plain.auth_files[1:] == (tmp_path / ".config/containers/auth.json", tmp_path / ".docker/config.json")
    assert plain.auth_files[0].name == "auth.json" and "run/containers" in str(plain.auth_files[0])
    assert plain.registries_conf[0] == Path("/etc/containers/registries.conf")
    own = tmp_path / ".config/containers/registries.conf"
    own.parent.mkdir(parents=True)
    own.touch()
    assert from_environment({"HOME": str(tmp_path)}).registries_conf == (own, own.with_name("registries.conf.d"))
    named = from_environment(
        {
            "HOME": "/h",
            "REGISTRY_AUTH_FILE": "/a.json",
            "CONTAINERS_REGISTRIES_CONF": "/r.conf",
            "XDG_RUNTIME_DIR": "/x",
        }
    )
    assert named.auth_files == (Path("/a.json"),) and named.registries_conf[0] == Path("/r.conf")
    runtime = from_environment({"HOME": "/h", "XDG_RUNTIME_DIR": "/x"})
    assert runtime.auth_files[0] == Path("/x/containers/auth.json")


@pytest.mark.parametrize("text", ["", "user", ":word", "user:a\x01b"])
def test_a_login_that_is_none_is_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_login(text, "--creds-file x")
    assert not text or text not in caught.value.message
    assert parse_login("user:a:b\n", "x") == Login("user", "a:b")


# -- over the wire -----------------------------------------------------------------------------------------------------


def test_headers_and_namespace_go_to_their_host_alone(tmp_path: Path) -> None:
    """Not along redirects: the storage is another host."""
    with FakeRegistry(redirect=True) as registry:
        digest = registry.add_blob(b"x" * 100)
        access = hosts(
            tmp_path,
            f'server = "http://{registry.host}"\n[header]\nX-Secret = "s3"\nauthorization = "Basic Og=="\n',
        )
        options = OpenOptions(retry=RetryPolicy(attempts=1), access=access)
        repository = open_repository(reference.parse(IMAGE), options)
        with repository.fetch(digest, 0, 100) as stream:
            assert stream.read(100) == b"x" * 100
        assert not repository.has_blob(of(b"y"))
        asked = registry.matching(server="registry")
        assert [request.headers["x-secret"] for request in asked] == ["s3"] * 2
        assert {request.authorization for request in asked} == {"Basic Og=="}
        assert all(request.path.endswith("?ns=registry.example%3A5000") for request in asked)
        (stored,) = registry.matching(server="storage")
        assert "x-secret" not in stored.headers and not stored.authorization and "ns=" not in stored.path
        repository.close()


def test_a_path_of_its_own(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        access = hosts(tmp_path, f'server = "http://{registry.host}/proxy/hub"\noverride_path = true\n')
        repository = open_repository(reference.parse(IMAGE), OpenOptions(retry=RetryPolicy(attempts=1), access=access))
        repository.has_blob(of(b"y"))
        assert registry.requests[0].path.startswith("/proxy/hub/team/app/blobs/sha256:")
        repository.close()


def test_explicit_logins_go_to_the_origin_and_not_to_mirrors(tmp_path: Path) -> None:
    with FakeRegistry(auth="basic", users={"u": "p"}) as mirror, FakeRegistry(auth="basic", users={"u": "p"}) as origin:
        text = f'server = "http://{origin.host}"\n[host."http://{mirror.host}"]\ncapabilities = ["pull", "resolve"]\n'
        access = Access(login=Login("u", "p"), certs_dirs=hosts(tmp_path, text).certs_dirs)
        image = origin.add_image("team/app", "1", [b"layer" * 10])
        options = OpenOptions(retry=RetryPolicy(attempts=1), access=access)
        repository = open_repository(reference.parse(IMAGE), options)
        assert repository.manifest("1")[1] == image.raw
        assert mirror.count() and not any(request.authorization for request in mirror.requests)
        assert any(request.authorization for request in origin.requests)
        repository.close()


def test_a_mirror_whose_certificates_can_not_be_loaded_is_passed_by(tmp_path: Path) -> None:
    with FakeRegistry() as origin:
        image = origin.add_image("team/app", "1", [b"layer" * 10])
        text = f'server = "http://{origin.host}"\n[host."https://m.example"]\nca = "none.pem"\n'
        options = OpenOptions(retry=RetryPolicy(attempts=1), access=hosts(tmp_path, text))
        repository = open_repository(reference.parse(IMAGE), options)
        assert repository.manifest("1")[1] == image.raw
        repository.close()


def test_files_that_only_others_may_read_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME is another user's, or containerd's files are root's: we are an ordinary user then."""
    access = from_environment({"HOME": str(tmp_path / "home")}, certs_dir=tmp_path / "certs.d")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("pathlib.Path.open", "pathlib.Path.exists", "pathlib.Path.is_dir", "pathlib.Path.glob", "os.listdir"):
        monkeypatch.setattr(name, refuse)
    (origin,) = find_endpoints(reference.parse(IMAGE), access)
    assert origin.host == "registry.example:5000"
