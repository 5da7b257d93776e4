"""Every way to fail has a gRPC code; the codes that containerd acts on are given for nothing else."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from lazyfs import errors
from lazyfs.limits import MAX_GRPC_WORDS
from snapshotter import status


def test_every_leaf_class_has_a_code_and_nothing_else_does() -> None:
    assert set(status.TABLE) == set(errors.leaf_classes())


def test_what_containerd_acts_on_is_said_of_snapshots_alone() -> None:
    acted_on = {StatusCode.NOT_FOUND, StatusCode.ALREADY_EXISTS, StatusCode.FAILED_PRECONDITION}
    said = {cls for cls, code in status.TABLE.items() if code in acted_on}
    assert said == {errors.SnapshotMissing, errors.SnapshotExists, errors.SnapshotUnfit}
    assert StatusCode.OK not in status.TABLE.values() and StatusCode.UNIMPLEMENTED not in status.TABLE.values()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SnapshotMissing("k", "x"), StatusCode.NOT_FOUND),
        (errors.SnapshotExists("k", "x"), StatusCode.ALREADY_EXISTS),
        (errors.SnapshotUnfit("k", "x"), StatusCode.FAILED_PRECONDITION),
        (errors.SnapshotInvalid("k", "x"), StatusCode.INVALID_ARGUMENT),
        (errors.UsageError("x"), StatusCode.INVALID_ARGUMENT),
        (errors.StoreFull("x"), StatusCode.RESOURCE_EXHAUSTED),
        (errors.DaemonUnreachable("x"), StatusCode.UNAVAILABLE),
        (errors.RegistryTimeout("h", "x"), StatusCode.UNAVAILABLE),
        (errors.Unauthorized("h", "x"), StatusCode.PERMISSION_DENIED),
        (errors.BlobMissing("h", "x"), StatusCode.DATA_LOSS),
        (errors.LayerQuarantined("l", "x"), StatusCode.DATA_LOSS),
        (errors.StoreBroken("x"), StatusCode.INTERNAL),
    ],
)
def test_groups(error: errors.LazyfsError, code: StatusCode) -> None:
    assert status.code_of(error) is code


def test_what_passes_may_be_asked_again() -> None:
    error = errors.StoreBroken("locked")
    error.temporary = True
    assert status.code_of(error) is StatusCode.UNAVAILABLE


def test_a_message_is_one_line_that_a_header_can_carry() -> None:
    error = errors.SnapshotMissing("k", "no\nsnapshot \udcff" + "é" * 5000)
    text = status.message_of(error)
    assert "\n" not in text and text.startswith("no snapshot ?é") and len(text.encode()) <= 2 * MAX_GRPC_WORDS
