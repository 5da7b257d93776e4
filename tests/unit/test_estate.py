"""What a daemon leaves to one of another release: what that does not know is passed over, what it lacks is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lazyfs import oci
from lazyfs.mount import claims
from lazyfs.mount.chains import Chains
from lazyfs.mount.claims import Claim
from lazyfs.mount.forest import Planted
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.mounted import Mounted
from lazyfs.mount.mounted_image import LayerFacts
from lazyfs.mount.showing import Shown
from lazyfs.mount.succession import Succession
from lazyfs.registry.config.node_logins import NodeLogins


def digest_of(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


LAYER = oci.Descriptor("application/vnd.oci.image.layer.v1.tar+zstd", digest_of(b"layer"), 5)
CONFIG = json.dumps(
    {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(b"diff")]}}
).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest_of(CONFIG),
            "size": len(CONFIG),
        },
        "layers": [LAYER.to_json()],
    }
).encode()
DOCUMENTS = {digest_of(MANIFEST): MANIFEST, digest_of(CONFIG): CONFIG}
TREE, NUMBER = 7, 3


def claimed() -> dict[str, Any]:
    """Return what today's daemon leaves of a chain."""
    shown = Shown("/run/lazyfs/erofs/tree", "erofs", "its self-test passed")
    layers = ((LAYER, digest_of(b"diff")),)
    claim = Claim("docker://registry.test/app:1", digest_of(MANIFEST), None, None, layers, shown)
    return claim.to_json() | {"numbers": [TREE, NUMBER]}


def mounted() -> dict[str, Any]:
    """Return what today's daemon leaves of a mount."""
    of_a_mount = {"name": "registry.test/app:1", "platform": "linux/amd64", "dir": "/mnt", "kind": "ro",
                  "state_dir": "", "leased": False, "caller": None}  # fmt: skip
    return claimed() | of_a_mount


def written(memory: int, *lines: dict[str, Any]) -> Inheritance:
    """Return what is made of lines that another daemon has written."""
    os.pwrite(memory, b"".join(b"\n" + json.dumps(line).encode() + b"\n" for line in lines), 4096)
    return Inheritance(memory, follows=True)


class Heir:
    """A daemon that takes over, with a forest and a disk that have all."""

    def __init__(self, inheritance: Inheritance) -> None:
        self.inheritance = inheritance
        self.logins = NodeLogins()
        self._planted = 0

        async def regain(*_: object) -> tuple[Planted, tuple[LayerFacts, ...]]:
            self._planted += 1
            tree = Planted(TREE, b"tree%d" % self._planted, cast(Any, None), ())
            return tree, (LayerFacts(cast(Any, SimpleNamespace(number=NUMBER)), True, ""),)

        async def release(_: Planted) -> None:
            self._planted -= 1

        planting = SimpleNamespace(release=release)
        showing = SimpleNamespace(regain=lambda *_: None, elsewhere="")
        images = SimpleNamespace(
            open=lambda *_: None, on_hop=None, regain=regain, planting=planting, node_logins=self.logins
        )
        none = cast(Any, None)
        self.chains = Chains(
            none, none, none, cast(Any, planting), none, none, cast(Any, showing), none, inheritance
        )  # fmt: skip
        service = SimpleNamespace(chains=self.chains)
        self.mounts = Mounted(
            none, cast(Any, images), none, cast(Any, showing), none, none, none, cast(Any, service), none, inheritance
        )
        catalog = SimpleNamespace(document=DOCUMENTS.get, reserve=lambda _: None)
        store = SimpleNamespace(stamp=lambda _: (1, 2))
        settings = SimpleNamespace(offline=False)
        self.succession = Succession(
            cast(Any, settings), inheritance, cast(Any, images), cast(Any, catalog), cast(Any, store), none,
            self.mounts, self.chains,
        )  # fmt: skip

    async def take_over(self, *, planted_before: bool) -> None:
        if planted_before:
            await self.succession._prepare()  # as a standby, before the other one has ended
        await self.succession.run()

    def shown(self) -> set[str]:
        return {f"mount:{one.id}" for one in self.mounts.all()} | {f"chain:{one.image}" for one in self.chains.all()}


CHAIN = "chain:docker://registry.test/app:1"  # as `shown` tells one
as_both = pytest.mark.parametrize("planted_before", [True, False], ids=["standby", "at once"])


@as_both
async def test_what_a_newer_daemon_says_besides_is_passed_over(memory: int, planted_before: bool) -> None:
    login = {"host": "registry.test", "repository": "app", "username": "u", "password": "p", "scope": "pull"}
    layer = claimed()["layers"][0] | {"verified_by": "somebody"}
    newer = {"shelf_life": 5, "layers": [layer | {"descriptor": layer["descriptor"] | {"data": "aGVsbG8="}}]}
    heir = Heir(
        written(
            memory,
            {"all": {"mount:a": mounted() | newer, "volume:1": {"of": "a kind that is not known"}}, "release": "9.9"},
            {"put": "chain:c", "value": claimed() | newer, "because": "it was asked for"},
            {"put": "logins:0", "value": {"logins": [login], "until": 12345}},
            {"freeze": "mount:a", "for": 3},
            {"put": "mount:b", "value": mounted() | {"access": {"login": ["u", "p"], "badge": "of no use"}}},
        )
    )
    await heir.take_over(planted_before=planted_before)
    assert heir.shown() == {"mount:a", "mount:b", CHAIN}
    (first, _) = heir.mounts.all()
    assert (first.dir, first.shown.driver, first.image.manifest.digest) == ("/mnt", "erofs", digest_of(MANIFEST))
    found = heir.logins.find("registry.test", "app")
    assert found is not None and (found.username, found.password) == ("u", "p")
    # It stays for a daemon that knows it: the newer one may come back.
    assert heir.inheritance.values("volume:") == {"volume:1": {"of": "a kind that is not known"}}
    assert Inheritance(memory, follows=True).values("") == heir.inheritance.values("")


OF_A_CHAIN = ("reference", "manifest_digest", "shown")
OF_A_MOUNT = (*OF_A_CHAIN, "name", "dir", "kind", "state_dir", "leased", "platform")


@as_both
@pytest.mark.parametrize(
    ("name", "value", "lacks"),
    [*(("chain:x", claimed, lack) for lack in OF_A_CHAIN), *(("mount:x", mounted, lack) for lack in OF_A_MOUNT)],
)
async def test_what_lacks_a_field_is_refused_alone(
    memory: int, planted_before: bool, name: str, value: Callable[[], dict[str, Any]], lacks: str
) -> None:
    old = value()
    del old[lacks]
    heir = Heir(
        written(
            memory,
            {"put": "mount:a", "value": mounted()},
            {"put": name, "value": old},
            {"put": "mount:b", "value": mounted()},
            {"put": "chain:c", "value": claimed()},
        )
    )
    await heir.take_over(planted_before=planted_before)
    assert heir.shown() == {"mount:a", "mount:b", CHAIN}
    assert len(heir.chains) == 1
    # The next one is not told of it again.
    assert list(heir.inheritance.values("")) == ["mount:a", "mount:b", "chain:c"]


@as_both
@pytest.mark.parametrize("lacks", ["plain_http", "access", "numbers", "caller"])
async def test_what_an_older_daemon_did_not_say_is_not_needed(memory: int, planted_before: bool, lacks: str) -> None:
    old = mounted()
    del old[lacks]
    heir = Heir(written(memory, {"put": "mount:a", "value": old}))
    await heir.take_over(planted_before=planted_before)
    assert heir.shown() == {"mount:a"}


def test_a_claim_is_what_it_was_written_from() -> None:
    claim = claims.from_json(json.loads(json.dumps(mounted())))
    assert claim.to_json() == {name: mounted()[name] for name in claim.to_json()}


def _without_layers(value: dict[str, Any]) -> None:
    del value["layers"]


def _without_digest(value: dict[str, Any]) -> None:
    del value["layers"][0]["descriptor"]["digest"]


ODD: dict[str, Callable[[dict[str, Any]], None]] = {
    "no layers": _without_layers,
    "no digest": _without_digest,
    "layers that are none": lambda value: value.update(layers=None),
    "numbers that are none": lambda value: value.update(numbers=None),
    "a mount that tells more": lambda value: value["shown"].append("more"),
    "a caller who tells more": lambda value: value.update(caller=[os.getpid(), 5.0, "more"]),
}


@as_both
@pytest.mark.parametrize("odd", ODD)
async def test_what_is_odd_hurts_no_other(memory: int, planted_before: bool, odd: str) -> None:
    value = mounted()
    ODD[odd](value)
    lines = ({"put": "mount:a", "value": mounted()}, {"put": "mount:x", "value": value},
             {"put": "chain:c", "value": claimed()})  # fmt: skip
    heir = Heir(written(memory, *lines))
    await heir.take_over(planted_before=planted_before)
    assert heir.shown() >= {"mount:a", CHAIN}
    assert heir._planted == len(heir.shown()), "what is not shown stays planted"


@as_both
@pytest.mark.parametrize("lacks", OF_A_MOUNT)
async def test_what_lacks_a_field_leaves_no_tree(memory: int, planted_before: bool, lacks: str) -> None:
    value = mounted()
    del value[lacks]
    heir = Heir(written(memory, {"put": "mount:a", "value": mounted()}, {"put": "mount:x", "value": value}))
    await heir.take_over(planted_before=planted_before)
    assert heir._planted == len(heir.shown())


@pytest.mark.parametrize(
    "line", [{"put": "mount:x"}, {"put": "mount:x", "value": "text"}, 5, ["x"], "all", None, {"all": None}]
)
def test_a_line_without_sense_is_passed_over(memory: int, line: Any) -> None:
    found = written(memory, {"put": "mount:a", "value": mounted()}, line, {"put": "mount:b", "value": mounted()})
    assert list(found.values("mount:")) == ["mount:a", "mount:b"]
