"""Every way to fail has a row in the exit code table, and the document that users read says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lazyfs import errors
from lazyfs.cli import exit_codes

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_every_leaf_class_has_an_exit_code_and_nothing_else_does() -> None:
    assert set(exit_codes.TABLE) == set(errors.leaf_classes())


def test_every_code_has_a_meaning_and_none_claims_success() -> None:
    assert set(exit_codes.TABLE.values()) <= set(exit_codes.MEANING)
    assert exit_codes.OK not in exit_codes.TABLE.values()
    assert exit_codes.INTERNAL not in exit_codes.TABLE.values()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.PlatformMissing("linux/s390x", ["linux/amd64"]), 3),
        (errors.ManifestMissing("host", "x"), 3),
        (errors.Unauthorized("host", "x"), 4),
        (errors.RegistryTimeout("host", "x"), 5),
        (errors.DigestMismatch("blob", "sha256:a", "sha256:b"), 6),
        (errors.TarInvalid("x", b"name"), 7),
        (errors.ToolMissing("runc"), 8),
        (errors.StoreFull("x"), 9),
        (errors.Interrupted("x"), 130),
        (ValueError("not ours"), 1),
    ],
)
def test_groups(error: Exception, code: int) -> None:
    assert exit_codes.code_of(error) == code


def test_run_keeps_its_own_failures_apart_from_the_containers_status() -> None:
    assert exit_codes.code_of(errors.ManifestMissing("host", "x"), "run") == 125
    assert exit_codes.code_of(ValueError("not ours"), "run") == 125
    assert exit_codes.code_of(errors.Interrupted("x"), "run") == 130


def test_the_document_lists_every_code_with_its_meaning() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.*?) \|$", DOCUMENT.read_text("utf-8"), re.M)
    told = {int(code): meaning for code, meaning, _ in rows}
    assert told == exit_codes.MEANING


def test_the_document_lists_every_class_beside_its_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.*?) \|$", DOCUMENT.read_text("utf-8"), re.M)
    told = {name: int(code) for code, _, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == {cls.__name__: code for cls, code in exit_codes.TABLE.items()}


def test_a_message_is_one_sentence_with_its_hint() -> None:
    error = errors.ToolMissing("runc", hint="apt install runc")
    assert str(error) == "runc is not installed (apt install runc)"
    assert error.message == "runc is not installed"
