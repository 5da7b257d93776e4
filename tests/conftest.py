"""Fixtures shared by all tests, and the guards: nothing is skipped in CI, and nothing is left behind.

Environment: CI set → a test that would be skipped fails. LAZYFS_TEST_SESSION is set here and inherited by every daemon
that the tests start, which is how a leftover one is told from somebody else's. LAZYFS_TEST_SHARED is a directory that
the workers of a session share.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.mount.premises import BOARD
from tests.faults import cases
from tests.helpers import real, real_image, service_images
from tests.helpers.daemon import Node
from tests.helpers.fake_registry import FakeRegistry

LINGER = 10.0  # seconds that a daemon may take to end after its last mount
_SESSION = pytest.StashKey[str]()
_TOP = pytest.StashKey[Path]()
_WORKERS_LEFT = pytest.StashKey[list[str]]()
_HAS_ROWS = ("fault matrix", "")  # the property of a test with rows: it comes to whoever prints, from a worker too
_MARKS = {
    "fuse": "needs /dev/fuse and the right to mount",
    "system": "runs real registries, containerd, runc or whole commands",
    "faults": "breaks networks, disks and processes on purpose",
    "slow": "takes more than ten seconds",
    "matrix": "has rows in the fault matrix, and lies with it",
}


@pytest.fixture
def memory() -> Iterator[int]:
    """Yield the fd of what daemons leave to each other, before anybody has: its board alone."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, BOARD)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Take away what a test's entry point set up: its handlers write to a stream that ends with the test."""
    loggers = [logging.getLogger(name) for name in ("lazyfs", "indexer", "snapshotter")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


def pytest_configure(config: pytest.Config) -> None:
    for name, text in _MARKS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    config.stash[_SESSION] = f"lazyfs-{uuid.uuid4().hex[:12]}"
    os.environ["LAZYFS_TEST_SESSION"] = config.stash[_SESSION]
    # Tests look for one daemon, and for what its death does. With a holder: tests.helpers.takeover, which asks for one.
    os.environ["LAZYFS_HOLD"] = "0"
    # Short, because Unix sockets lie below it; on disk, because overlayfs takes no overlay as its upper directory.
    config.stash[_TOP] = Path(tempfile.mkdtemp(prefix="lazyfs-test-", dir="/var/tmp"))
    os.environ["XDG_CACHE_HOME"] = str(config.stash[_TOP] / "cache")  # the converter's work directory, and nobody's own
    if "PYTEST_XDIST_WORKER" not in os.environ:  # what is dear to make is made once, and the workers find it here
        os.environ["LAZYFS_TEST_SHARED"] = str(config.stash[_TOP] / "shared")
    config.stash[_WORKERS_LEFT] = []
    config.pluginmanager.register(_MatrixTimes())
    config.stash[_TOP].chmod(0o755)  # tests run as other users too
    config.add_cleanup(lambda: shutil.rmtree(config.stash[_TOP], ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(tests).parts[0]
        if folder in _MARKS:
            item.add_marker(folder)
        if item.get_closest_marker("fuse") and not os.access("/dev/fuse", os.R_OK | os.W_OK):
            item.add_marker(pytest.mark.skip(reason="no /dev/fuse that we may open"))
    rows = {(row.module, row.test) for row in cases.shown()}
    for item in items:
        if isinstance(item, pytest.Function) and (item.module.__name__, item.originalname) in rows:
            item.user_properties.append(_HAS_ROWS)
            if tests / "faults" in item.path.parents:
                item.add_marker("matrix")
    _mix(items, tests / "system")


def _mix(items: list[pytest.Item], system: Path) -> None:
    """Spread the longest files, those of whole systems, between the others, so that none of them is the last.

    A file stays together, and its tests in their order.
    """
    files = {path: [item for item in items if item.path == path] for path in dict.fromkeys(item.path for item in items)}
    kinds = [path for path in files if system not in path.parents], [path for path in files if system in path.parents]
    place = {
        path: number / len(kind) * share
        for kind, share in zip(kinds, (1.0, 0.8), strict=True)
        for number, path in enumerate(kind)
    }
    items[:] = [item for path in sorted(files, key=place.__getitem__) for item in files[path]]


class _MatrixTimes:
    """How long the fault matrix takes, for one line at the end. Nothing fails by it. Times in seconds."""

    def __init__(self) -> None:
        self._tests: set[str] = set()  # those with rows
        self._own = 0.0  # of those, set up and taken down
        self._first = self._last = 0.0  # of those, on the machine's clock

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if any(tuple(each) == _HAS_ROWS for each in report.user_properties):
            self._tests.add(report.nodeid)
            self._own += report.duration
            self._first = min(self._first or report.start, report.start)
            self._last = max(self._last, report.stop)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._tests:
            took = f"{self._last - self._first:.0f} s from the first to the last, {self._own:.0f} s one after another"
            terminalreporter.write_line(f"fault matrix: {len(self._tests)} tests with rows, {took}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and CI is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and CI is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
    yield
    left = _leftovers(session.config)
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left"] = left  # a worker of xdist: the process that prints and exits hears of it below
        return
    left += session.config.stash[_WORKERS_LEFT]
    if left:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("\nleft behind by the tests (ended and unmounted now):", red=True)
            for line in left:
                reporter.write_line(f"  {line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_WORKERS_LEFT].extend(getattr(node, "workeroutput", {}).get("left", []))


def _leftovers(config: pytest.Config) -> list[str]:
    """End and unmount what the session left, and return a line for each."""
    marker = config.stash[_SESSION].encode()
    deadline = time.monotonic() + LINGER
    while (processes := real.processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [f"process {pid}: {words}" for pid, words in processes]
    for pid, _ in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    basetemp = getattr(getattr(config, "_tmp_path_factory", None), "_basetemp", None)
    for directory in (config.stash[_TOP], basetemp):
        if directory is not None:
            left += [f"mount {point}" for point in real.unmount_below(directory)]
    return left


@pytest.fixture
def scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Yield an empty directory with a short path on disk; what is still mounted in it afterwards is a failure."""
    yield from _scratch(request)


@pytest.fixture(scope="module")
def module_scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Yield a directory like `scratch` for all tests of a module."""
    yield from _scratch(request)


def _scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=request.config.stash[_TOP]))
    directory.chmod(0o755)
    yield directory
    left = real.unmount_below(directory)
    shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"still mounted after the test: {left}"


@pytest.fixture
def driver() -> str:
    """How trees reach the kernel: `tests.helpers.daemon.both_drivers` runs a test with each.

    What is about commands, the store or the network runs with the one whose daemons start with the least work; the
    default is what whole commands and containerd's tests have.
    """
    return "fuse"


@pytest.fixture
def node(scratch: Path, driver: str) -> Iterator[Node]:
    """Yield a store and its daemon, not yet started; whatever it leaves behind fails the test."""
    with Node(scratch, DRIVER=driver) as one:
        yield one


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """Yield a registry in this process whose faults are under the test's control."""
    with FakeRegistry() as one:
        yield one


@pytest.fixture(scope="session")
def docker_registry(request: pytest.FixtureRequest) -> Iterator[real.DockerRegistry]:
    """Yield Debian's docker-registry on a loopback port, one for the session: use a repository name of your own."""
    with real.docker_registry(request.config.stash[_TOP] / "registry") as one:
        yield one


@pytest.fixture(scope="session")
def containerd(request: pytest.FixtureRequest) -> Iterator[real.Containerd]:
    """Yield a containerd of our own, one for the session, with the overlayfs snapshotter."""
    with real.containerd(request.config.stash[_TOP] / "containerd") as one:
        yield one


@pytest.fixture(scope="session")
def small_layers(request: pytest.FixtureRequest) -> list[Path]:
    """Return the layer tars (base, top) of the small real image; see tests.helpers.real_image."""
    directory = request.config.stash[_TOP] / "small"
    directory.mkdir()
    base, top = directory / "base.tar", directory / "top.tar"
    real_image.write_base(base)
    real_image.write_top(top)
    return [base, top]


@pytest.fixture(scope="session")
def small_layout(small_layers: list[Path]) -> str:
    """Return the small real image as a reference oci:DIR:small with two gzip layers."""
    return real.build_layout(small_layers[0].parent / "layout", "small", small_layers)


@pytest.fixture(scope="session")
def small_image(docker_registry: real.DockerRegistry, small_layout: str) -> str:
    """Return docker://127.0.0.1:PORT/small:original, the small real image in the session's docker-registry."""
    reference = docker_registry.image("small", "original")
    real.copy_image(small_layout, reference)
    return reference


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest) -> Iterator[service_images.ServiceImages]:
    """Yield a registry with the converted images of services, made once for all workers; nobody pushes to it."""
    shared = Path(os.environ["LAZYFS_TEST_SHARED"])
    blobs = service_images.build(shared)
    with real.docker_registry(request.config.stash[_TOP] / "services", blobs) as one:
        yield service_images.ServiceImages(one, service_images.sizes(shared), shared / "services/layout")
