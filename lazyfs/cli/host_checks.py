"""What `lazyfs doctor` looks at on this machine. Each check is short, changes nothing that stays, and never raises."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import resource
import select
import shutil
import signal
import ssl
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lazyfs.container import mounts
from lazyfs.errors import DaemonUnreachable, LazyfsError
from lazyfs.limits import END_TIMEOUT, TOOL_TIMEOUT
from lazyfs.units import GiB, format_size

if TYPE_CHECKING:
    from lazyfs.config import Settings

_LOOK = 0.01  # seconds between looks whether a child has ended
_MIN_FILES = 4096  # descriptors; each open file of a container's tree and each connection takes one


class State(StrEnum):
    """`FAIL` is for what `run` or `mount` can't do without; `WARN` for what costs something; `OK` also informs."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `mend` says what to do about it; empty when all is well."""

    name: str
    state: State
    text: str
    mend: str = ""


def all_checks(settings: Settings) -> list[Check]:
    """Look at everything that needs no registry. Blocking, some seconds at worst; it forks: no other threads."""
    euid = os.geteuid()
    found = [_kernel(), _outliving(settings, euid), _fuse_device()]
    if euid != 0:
        found += [_fusermount(), _user_allow_other()]
    found += [_python_package(name, why) for name, why in _PACKAGES]
    found += [_user_namespaces(euid), _overlay(settings, euid), _erofs(), _runtime()]
    found += [_tool(name, why) for name, why in _TOOLS if euid != 0 or name != "newuidmap"]
    found += [_open_files(), _store_directory(settings, euid), _store_space(settings), _daemon(settings)]
    if euid == 0:
        found.append(_idmapped(settings))
    found += [_certificates(), *_proxies()]
    return found


_PACKAGES = (("pyfuse3", "mounting"), ("trio", "mounting"), ("lru", "mounting"), ("zstandard", "reading layers"),
             ("msgspec", "reading tables of contents"), ("requests", "talking to registries"))  # fmt: skip
_DISTRIBUTION = {"lru": "lru-dict"}
_TOOLS = (("newuidmap", "more than one user id in containers without root"),)


def _kernel() -> Check:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if platform.system() != "Linux":
        return Check("kernel", State.FAIL, f"{platform.system()} {release}", "mounting needs Linux")
    if version < (5, 4):
        return Check("kernel", State.WARN, f"Linux {release}", "nothing older than Linux 5.4 was tried")
    return Check("kernel", State.OK, f"Linux {release} {platform.machine()}")


def _outliving(settings: Settings, euid: int) -> Check:
    name = "mounts outlive lazyfsd"
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    if euid != 0:
        return Check(name, State.OK, "no: root alone can hold a FUSE connection")
    if not settings.hold:  # somebody's choice, which needs no mending; a unit that says --hold is not bound by it
        return Check(name, State.OK, "no, but for a lazyfsd started with --hold: the setting hold is false")
    if match is None or (int(match[1]), int(match[2])) < (6, 9):
        return Check(name, State.WARN, "no: a lazyfsd that dies takes its mounts along", "Linux 6.9 or newer")
    return Check(name, State.OK, "yes")


def _fuse_device() -> Check:
    name = "/dev/fuse"
    try:
        os.close(os.open(name, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Check(name, State.FAIL, "does not exist", "modprobe fuse; in a container, pass the device into it")
    except OSError as error:
        return Check(
            name,
            State.FAIL,
            f"can't be opened: {error.strerror}",
            "chmod 0666 /dev/fuse; in a container, allow the device",
        )
    return Check(name, State.OK, "can be opened")


def _fusermount() -> Check:
    path = shutil.which("fusermount3")
    if path is None:
        return Check("fusermount3", State.FAIL, "not installed", "apt install fuse3")
    if not os.stat(path).st_mode & stat.S_ISUID:
        return Check("fusermount3", State.FAIL, f"{path} is not setuid root", f"chmod u+s {path}")
    return Check("fusermount3", State.OK, path)


def _user_allow_other() -> Check:
    try:
        allowed = re.search(r"^\s*user_allow_other\b", Path("/etc/fuse.conf").read_text("utf-8", "replace"), re.M)
    except OSError:
        allowed = None
    if allowed:
        return Check("user_allow_other", State.OK, "set in /etc/fuse.conf: other users may enter your mounts")
    return Check("user_allow_other", State.OK, "not set in /etc/fuse.conf: only you can enter your mounts")


def _python_package(name: str, why: str) -> Check:
    distribution = _DISTRIBUTION.get(name, name)
    try:
        importlib.import_module(name)
        version = importlib.metadata.version(distribution)
    except ImportError as error:  # PackageNotFoundError is one too
        return Check(distribution, State.FAIL, f"needed for {why}: {error}", "pip install 'lazyfs[mount]'")
    return Check(distribution, State.OK, version)


def _user_namespaces(euid: int) -> Check:
    name = "user namespaces"
    problem = _in_child(lambda: mounts.unshare(mounts.CLONE_NEWUSER))
    if not problem:
        return Check(name, State.OK, "can be created")
    state = State.FAIL if euid != 0 else State.OK  # root runs containers without one
    return Check(
        name, state, problem if euid != 0 else f"{problem}; not needed as root",
        "" if euid == 0 else "sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns",
    )  # fmt: skip


def _overlay(settings: Settings, euid: int) -> Check:
    """Mount an overlay in a namespace of its own with its upper directory where containers will have theirs."""
    name = "overlayfs"
    base = existing_ancestor(settings.root)
    try:
        scratch = tempfile.mkdtemp(prefix=".lazyfs-doctor-", dir=base)
    except OSError as error:
        return Check(name, State.FAIL, f"{base} can't be written: {error.strerror}", "choose another --root")
    try:
        problem = _in_child(lambda: _mount_overlay(os.fsencode(scratch), euid))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if problem:
        mend = "modprobe overlay; the store must lie on a file system that can be an upper layer (not NFS or overlay)"
        return Check(name, State.FAIL, problem, mend)
    return Check(name, State.OK, f"a test mount with its upper directory on {base} works")


def _mount_overlay(scratch: bytes, euid: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if euid == 0:
        mounts.unshare(mounts.CLONE_NEWNS)
    else:
        mounts.unshare(mounts.CLONE_NEWNS | mounts.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    mounts.follow_host()
    lower, upper, work, merged = (os.path.join(scratch, n) for n in (b"lower", b"upper", b"work", b"merged"))
    for directory in (lower, upper, work, merged):
        os.mkdir(directory)
    Path(os.fsdecode(lower), "file").write_text("lower")
    extra = b"userxattr" if euid != 0 else b""
    mounts.mount(b"overlay", merged, "overlay", options=mounts.overlay_options(lower, upper, work, extra=extra))
    shown = Path(os.fsdecode(merged), "file")
    try:
        if shown.read_text() != "lower":
            raise OSError("the overlay shows other bytes than its lower directory")
        shown.write_text("upper")  # a copy-up
        shown.unlink()  # a whiteout
    finally:
        mounts.umount(merged, lazy=True)
        # overlayfs leaves a directory of mode 0 behind that only this namespace's root may remove
        shutil.rmtree(work, ignore_errors=True)


def _in_child(work: Callable[[], None]) -> str:
    """Do `work` in a forked child, so that its namespaces end with it. Return "" or what went wrong."""
    end, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(end)
            work()
            code = 0
        except (LazyfsError, OSError) as error:
            os.write(start, str(error).encode("utf-8", "backslashreplace")[:1000])
        finally:
            os._exit(code)  # nothing of the parent's may run in this copy of it
    os.close(start)
    with os.fdopen(end, "rb", buffering=0) as pipe:
        # One read: the child writes at most once, less than a pipe takes at once, and else hangs up.
        ready, _, _ = select.select([pipe], [], [], TOOL_TIMEOUT)
        text = (pipe.read(1000) or b"").decode("utf-8", "replace") if ready else ""
    status = _reap(pid, TOOL_TIMEOUT) if ready else None
    if status is None:
        os.kill(pid, signal.SIGKILL)
        # Inside the kernel it may outlive that, for a dead disk or mount; then init takes it away after us.
        _reap(pid, END_TIMEOUT)
        return text or f"no answer within {TOOL_TIMEOUT:.0f} s"
    return "" if status == 0 else text or f"failed with status {os.waitstatus_to_exitcode(status)}"


def _reap(pid: int, patience: float) -> int | None:
    """Return a child's wait status; None: it has not ended after `patience` seconds. Blocking, as long as that."""
    deadline = time.monotonic() + patience
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(_LOOK)


def _erofs() -> Check:
    try:
        known = re.search(r"\berofs$", Path("/proc/filesystems").read_text(), re.M) is not None
    except OSError:
        known = False
    module = Path(f"/lib/modules/{platform.release()}/kernel/fs/erofs").is_dir()
    if known or module:
        return Check("erofs", State.OK, "in the kernel" if known else "as a module; modprobe erofs brings its driver")
    return Check("erofs", State.OK, "not in this kernel: the fuse driver is used")


def _runtime() -> Check:
    for name in ("runc", "crun"):
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
        if path:
            return Check("container runtime", State.OK, f"{path}, {_version_of(path)}")
    return Check("container runtime", State.FAIL, "neither runc nor crun is installed", "apt install runc")


def _version_of(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=TOOL_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"which does not tell its version: {error}"
    return (done.stdout.decode("utf-8", "replace").splitlines() or ["which does not tell its version"])[0]


def _tool(name: str, why: str) -> Check:
    path = shutil.which(name)
    return Check(name, State.OK if path else State.WARN, path or f"not installed; it gives {why}", "" if path else
                 "apt install uidmap")  # fmt: skip


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"soft {soft}, hard {hard}"
    if hard != resource.RLIM_INFINITY and hard < _MIN_FILES:
        return Check("open files", State.WARN, text, f"raise the hard limit to {_MIN_FILES} (ulimit -Hn, LimitNOFILE=)")
    return Check("open files", State.OK, text)


def existing_ancestor(path: Path) -> Path:
    """Return `path` or the nearest directory above it that exists."""
    for candidate in (path, *path.parents):
        if candidate.is_dir():
            return candidate
    return Path("/")


def _store_directory(settings: Settings, euid: int) -> Check:
    name = "store"
    root = settings.root
    if not os.path.lexists(root):
        above = existing_ancestor(root)
        if not os.access(above, os.W_OK | os.X_OK):
            return Check(name, State.FAIL, f"{root} can't be made: {above} is not yours", "choose another --root")
        return Check(name, State.OK, f"{root} will be made when it is needed")
    try:
        facts = root.stat()
    except OSError as error:
        return Check(name, State.FAIL, f"{root}: {error.strerror}", "choose another --root")
    if not stat.S_ISDIR(facts.st_mode):
        return Check(name, State.FAIL, f"{root} is no directory", "choose another --root")
    if facts.st_uid != euid:
        return Check(name, State.FAIL, f"{root} belongs to user {facts.st_uid}", "chown it, or choose another --root")
    if facts.st_mode & 0o022:
        return Check(name, State.FAIL, f"{root} can be written by others", f"chmod go-w {root}")
    if not os.access(root, os.W_OK | os.X_OK):
        return Check(name, State.FAIL, f"{root} can't be written", "is the file system read-only?")
    return Check(name, State.OK, f"{root}")


def _store_space(settings: Settings) -> Check:
    base = existing_ancestor(settings.root)
    facts = os.statvfs(base)
    free, bound = facts.f_bavail * facts.f_frsize, settings.store_size
    text = f"{format_size(free)} free on {base}, bound {format_size(bound)}"
    if free < GiB:
        return Check("store space", State.WARN, text, "with a full disk layers are fetched again and again: make room")
    if free < bound:
        return Check("store space", State.OK, f"{text} (the disk's end comes first; nothing fails then)")
    return Check("store space", State.OK, text)


def _daemon(settings: Settings) -> Check:
    from lazyfs import control_client

    texts = []
    for socket in control_client.sockets(settings):
        try:
            started = time.monotonic()
            with control_client.connect(socket) as daemon:
                facts = daemon.call("status").get("daemon", {})
            took = (time.monotonic() - started) * 1000
            texts.append(
                f"version {facts.get('version')}, pid {facts.get('pid')}, answers in {took:.0f} ms, "
                f"driver {facts.get('driver')}: {facts.get('reason')}"
            )
        except DaemonUnreachable as error:
            if error.hint:  # somebody listens and does not answer; without a hint it is a killed daemon's socket
                return Check("daemon", State.WARN, f"{socket}: {error.message}", error.hint)
        except LazyfsError as error:
            return Check("daemon", State.WARN, f"{socket}: {error.message}", error.hint)
    return Check("daemon", State.OK, "; ".join(texts) or "none is running; run and mount start one")


def _idmapped(settings: Settings) -> Check:
    """Try whether what the daemon shows can be idmapped, which pods with user namespaces profit from."""
    from lazyfs.cli import idmapped

    name = "idmapped mounts"
    problem = idmapped.problem(settings)
    if problem is None:
        return Check(name, State.OK, "not known: a daemon has to run for the test")
    if problem:
        text = f"{problem}; pods with user namespaces copy the files of lazy images when they are made"
        return Check(name, State.OK, text)
    return Check(name, State.OK, "the daemon's mounts can be idmapped: lazyfs install offers remap-ids to containerd")


def _certificates() -> Check:
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        path = os.environ.get(name)
        if path:
            good = os.path.exists(path)
            return Check("CA bundle", State.OK if good else State.WARN, f"{path} (${name})", "" if good else
                         "the file does not exist: no TLS connection will be trusted")  # fmt: skip
    paths = ssl.get_default_verify_paths()
    if paths.cafile or (paths.capath and any(os.scandir(paths.capath))):
        return Check("CA bundle", State.OK, paths.cafile or paths.capath or "")
    return Check("CA bundle", State.WARN, "the system has none", "apt install ca-certificates")


def _proxies() -> list[Check]:
    found = []
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        value = os.environ.get(name) or os.environ.get(name.lower())
        if value:
            found.append(Check("proxy", State.OK, f"{name} is {without_secret(value)}"))
    bypass = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    if bypass and found:
        found.append(Check("proxy", State.OK, f"not for {bypass}"))
    return found


def without_secret(url: str) -> str:
    """Return a proxy's address without user name and password."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme else host
