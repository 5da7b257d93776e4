"""Settings: what makes no sense is refused in one sentence that names where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.config import load
from lazyfs.errors import UsageError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("LAZYFS_CONFIG", str(path))
    return path


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("read_timeout = -1", "read_timeout can't be negative"),
        ('store_size = "much"', "store_size: 'much' is not a size"),
        ('driver = "ext4"', "driver can't be 'ext4'"),
        ('background_rate = "10kB"', "background_rate is 64KiB a second at least, or 0"),
        ("prefetch_rate = 1", "prefetch_rate is 64KiB a second at least, or 0"),
        ("no_such_thing = 1", "no_such_thing"),
        ("= 1", "can't be read"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(config: Path, line: str, sentence: str) -> None:
    config.write_text(line)
    with pytest.raises(UsageError) as refused:
        load()
    assert sentence in refused.value.message and str(config) in refused.value.message


def test_rates_are_sizes_a_second(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('background_rate = "10MB"\nprefetch_rate = 0\n')
    assert (load().background_rate, load().prefetch_rate) == (10_000_000, 0)
    monkeypatch.setenv("LAZYFS_BACKGROUND_RATE", "1MiB")
    assert load().background_rate == 1 << 20


def test_the_run_directory_is_named_as_the_mount_table_has_it(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "var").symlink_to(tmp_path / "run")
    settings = load({"run": str(tmp_path / "var" / "lazyfs")})
    assert settings.shown == (tmp_path / "run" / "lazyfs" / "erofs").resolve()
