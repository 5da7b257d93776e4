"""A link that drops to a tenth in the middle of a start: right bytes, no hang, and what is read before what may be."""

from __future__ import annotations

from lazyfs.format.trace import Read, Trace, encode
from perf.shaper import Shaper
from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

SIZE = 500_000
FILES = {f"f{number:02}": pattern(SIZE, number) for number in range(60)}
SMALL = {f"s{number}": pattern(100_000, 100 + number) for number in range(4)}
TRACED = [*list(FILES)[:54], "s0", "s1"]
DEMANDED = ["s2", "s0", "s3", "s1"]  # two that the trace does not tell of, two that it has at its end
MBIT = 160.0
EACH = 20.0  # seconds for one of them: far more than its bytes take the link as it is then


@shows(
    Case(
        "network-tenth",
        Area.NETWORK,
        "the link drops to a tenth in the middle of a start",
        RIGHT,
        "nothing: what is read comes before what is fetched ahead",
    ),
)
def test_demand_overtakes_a_replay_on_a_link_that_drops_to_a_tenth(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"DRIVER": "fuse", "PREFETCH": "1", "BACKGROUND": "1", "LEARN": "0"}
    node.settings |= {"READ_TIMEOUT": f"{EACH:.0f}", "ANSWER_TIMEOUT": "10"}
    tar = tar_of(*(file(name, data) for name, data in (FILES | SMALL).items()))
    image = add(registry, "one", zstd_chunked_layer(tar, chunk_size=1 << 17, frame_size=1 << 17))
    told = Trace(image.digest, image.layers, tuple(Read(name.encode(), 0, 0, SIZE) for name in TRACED))
    (node.root / "traces").mkdir(mode=0o700, parents=True)
    node.root.chmod(0o700)
    (node.root / "traces" / image.digest.removeprefix("sha256:")).write_bytes(encode(told))
    host, _, port = registry.host.partition(":")
    with Shaper((host, int(port)), rtt=0.02, mbit=MBIT) as shaper:
        reference = image.reference.replace(registry.host, f"127.0.0.1:{shaper.port}")
        tree = node.mount(reference)
        until(lambda: shaper.traffic().down > 3_000_000, "the replay is under way")
        shaper.change(MBIT / 10)
        for name in DEMANDED:
            assert node.read(tree / name, timeout=2 * EACH) == SMALL[name]
        assert node.layer()["present"] < 40 * SIZE, "the replay goes on meanwhile, and comes behind"
        shaper.change(MBIT)
        until(lambda: node.layer()["verified"] and node.layer()["complete"], "all goes on as before", 60)
        for name, data in (FILES | SMALL).items():
            assert node.read(tree / name) == data
        assert node.layer()["bytes"]["demand"] < 10 * SIZE
        node.stop()
