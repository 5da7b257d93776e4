"""The real parts under the other system tests: they start, they carry our small image, and they leave nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tests.helpers import real, real_image


def test_the_small_image_has_the_same_bytes_each_time(small_layers: list[Path], scratch: Path) -> None:
    again = scratch / "again.tar"
    real_image.write_base(again)
    assert again.read_bytes() == small_layers[0].read_bytes()
    real_image.write_top(again)
    assert again.read_bytes() == small_layers[1].read_bytes()


def test_containerd_pulls_mounts_and_runs_the_small_image(containerd: real.Containerd, small_image: str) -> None:
    name = small_image.removeprefix("docker://")
    containerd.pull(name)
    with containerd.mounted(name) as tree:
        assert (tree / "etc/hostname").read_bytes() == b"lazy\n"
        assert not (tree / "etc/debian_version").exists()
        assert os.listdir(tree / "usr/share/doc") == ["only"]
        assert (tree / "odd/plain").stat().st_nlink == 2
        assert stat.S_ISCHR((tree / "odd/null").lstat().st_mode)
        assert os.getxattr(tree / "odd/tagged", "user.colour") == b"green"
        assert (tree / "odd/tagged").stat().st_mtime_ns == 1234567890123456789
        files = sum(len(names) for _, _, names in os.walk(tree))
        assert files > 1000
    assert real.mounts_below(containerd.directory) == []
    said = containerd.ctr("run", "--rm", name, "small", "python3", "-c", "import json, ssl; print(json.dumps('runs'))")
    assert said == '"runs"\n'
    assert real.mounts_below(containerd.directory) == []
