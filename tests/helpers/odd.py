"""One layer with everything in it that a full unpack as root accepts, sane or not."""

from __future__ import annotations

from tests.helpers.tars import (
    ACL_ONE_USER,
    acl,
    block,
    capability,
    char,
    dir_,
    fifo,
    file,
    hardlink,
    old_file,
    sparse,
    symlink,
    tar_of,
)

LONG = "deep/" + "/".join(f"directory-{i:02}-with-a-name-of-some-length" for i in range(8)) + "/file"
SPARSE_RUNS = ((0, b"begin"), (10_000, b"m" * 700), (70_000, b"end"))
SPARSE_SIZE = 100_000
MANY_RUNS = tuple((i * 5000, b"%03d" % i) for i in range(40))


def _pattern(size: int) -> bytes:
    """Bytes that are no two alike in a row and compress a little."""
    return b"".join(b"%08d\n" % i for i in range(size // 9 + 1))[:size]


def odd_tar() -> bytes:
    """Return the tar. Its tree is the same whoever unpacks it; names occur twice, parents are missing, links cross.

    Not in it, because umoci refuses them: global PAX headers, type 7, and old GNU sparse files.
    """
    return tar_of(
        dir_("./", mode=0o755),
        dir_("bin", mode=0o755, mtime_ns=1_600_000_000_123_456_789),
        file("bin/su", b"#!/bin/sh\n", mode=0o4755, uid=0, gid=0),
        file("bin/wall", b"wall", mode=0o2755, gid=5),
        dir_("tmp", mode=0o1777),
        file("bin/ping", b"ping", xattrs={"security.capability": capability()}),
        file(
            "etc/acl",
            b"acl",
            mode=0o640,
            xattrs={
                "user.mime": b"text/plain",
                "user.binary": b"\0\xff=\n",
                "system.posix_acl_access": acl(*ACL_ONE_USER),
            },
        ),
        dir_("etc/labelled", xattrs={"user.empty": b""}),
        symlink("lib", "usr/lib", uid=1, gid=2),
        symlink("absolute", "/etc/passwd"),
        symlink("dangling", "../../outside/of/everything"),
        symlink("long-link", "x/" * 150 + "y"),
        hardlink("bin/su-again", "bin/su"),
        hardlink("third-name", "bin/su-again"),
        hardlink("link-to-a-link", "lib"),
        char("dev/null", 1, 3, mode=0o666),
        char("dev/high", 250, 300_000),
        block("dev/loop7", 7, 7, gid=6),
        fifo("run/pipe", mode=0o600),
        file("empty"),
        file("one", b"1"),
        file("block", b"b" * 512),
        file("block-and-one", b"b" * 513),
        file("big", _pattern(3_400_000)),
        *(file(f"many/small-{i:03}", _pattern(i * 37)) for i in range(120)),
        file("missing/parents/everywhere", b"orphan"),
        file("/leading-slash", b"rooted"),
        file("./leading-dot", b"dotted"),
        file(LONG, b"far down"),
        file("gnu/" + "long-" * 40 + "name", b"gnu", style="gnu"),
        file("split/" + "p" * 90 + "/" + "n" * 90, b"ustar", style="ustar"),
        old_file("ancient", b"v7", style="v7"),
        old_file("old-directory/", b"", style="v7", mode=0o700),
        file(b"latin1-\xe9\xff", b"no utf-8"),
        file(b"latin1-dir-\xe9/inside", b"no utf-8 either"),
        symlink(b"latin1-link", b"latin1-\xe9\xff"),
        hardlink(b"latin1-hard-\xfe", b"latin1-\xe9\xff"),
        file("unicode-\N{SNOWMAN}-\N{GRINNING FACE}", b"utf-8"),
        file(" odd\tname\nwith\\everything\"'", b"odd"),
        file("star*?[a]", b"glob"),
        file("large-owner", b"o", uid=2**31 - 2, gid=2**31 - 2),
        file("gnu-owner", b"o", uid=3_000_000, gid=4_000_000, style="gnu"),
        file("named-owner", b"n", uid=33, gid=33, uname="www-data", gname="www-data"),
        file("half-second", b"t", mtime_ns=1_500_000_000_500_000_000),
        file("last-nanosecond", b"t", mtime_ns=1_500_000_000_999_999_999),
        file("before-1970", b"t", mtime_ns=-1_000_000_000),
        file("epoch", b"t", mtime_ns=0),
        file("after-2038", b"t", mtime_ns=5_000_000_000_000_000_000),
        sparse("sparse/0.0", SPARSE_RUNS, SPARSE_SIZE, "0.0"),
        sparse("sparse/0.1", SPARSE_RUNS, SPARSE_SIZE, "0.1"),
        sparse("sparse/1.0", MANY_RUNS, 300_000, "1.0"),
        sparse("sparse/only-a-hole", (), 50_000, "1.0"),
        file("twice", b"first"),
        file("twice", b"second and last", mode=0o600),
        dir_("twice-a-directory", mode=0o700),
        dir_("twice-a-directory", mode=0o711, mtime_ns=1_400_000_000 * 10**9),
        file("was-a-link-target", b"the old content"),
        hardlink("keeps-the-old", "was-a-link-target"),
        file("was-a-link-target", b"the new content"),
        file("no-permissions", b"secret", mode=0),
    )
