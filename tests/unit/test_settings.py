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


def test_another_store_than_the_files_has_a_run_directory_of_its_own(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config.write_text(f'root = "{tmp_path}/store"\nrun = "{tmp_path}/run"\n')
    assert load().run == tmp_path / "run" == load({"root": tmp_path / "store"}).run
    others = {load({"root": tmp_path / name}).run for name in ("one", "two")}
    assert len(others) == 2 and {other.parent for other in others} == {tmp_path / "run"}
    assert load({"root": tmp_path / "one", "run": tmp_path / "r"}).run == tmp_path / "r"
    monkeypatch.setenv("LAZYFS_RUN", str(tmp_path / "env"))
    assert load({"root": tmp_path / "one"}).run == tmp_path / "env"
