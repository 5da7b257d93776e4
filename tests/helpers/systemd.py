"""A real systemd as the first process of namespaces of its own, over a throw-away copy of this machine's file system.

What it writes is gone with it. The network is the machine's. The kernel's own hierarchy of control groups serves it, in
one of them that is taken away at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import real
from tests.helpers.daemon import until

_PROGRAM = "/lib/systemd/systemd"
# $1: an empty directory, $2: the control group's name, further ones: directories that must be the machine's own.
_BOOT = r"""
set -e
place=$1; group=$2; shift 2
mount --make-rprivate /
mount -t tmpfs none "$place"
mkdir "$place"/upper "$place"/work "$place"/root "$place"/groups
mount -t cgroup2 none "$place"/groups
mkdir "$place"/groups/"$group"
echo $$ > "$place"/groups/"$group"/cgroup.procs
exec unshare --cgroup bash -c '
set -e
cd "$0"
mount -t overlay none -o lowerdir=/,upperdir=upper,workdir=work root
for directory; do
    mkdir -p root"$directory"
    mount --rbind "$directory" root"$directory"
done
mount -t proc none root/proc
mount -t sysfs none root/sys
mount -t cgroup2 none root/sys/fs/cgroup
mount --rbind /dev root/dev
for directory in run tmp; do mount -t tmpfs none root/$directory; done
cd root
mkdir -p before
pivot_root . before
umount -l /before
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
printf "[Unit]\nDescription=of a test\n" > /etc/systemd/system/lazyfs-test.target
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin PROGRAM --system --unit=lazyfs-test.target
' "$place" "$@"
"""


class Systemd:
    """One that runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid  # of its first process, out here

    def words(self, *words: str | Path) -> list[str]:
        """Return the words that run a program in there."""
        inside = ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        return [*inside, "env", "-i", f"PATH={path}", "HOME=/root", *map(str, words)]

    def done(self, *words: str | Path, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program in there to its end."""
        ours = self.words(*words)
        return subprocess.run(
            ours, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )

    def call(self, *words: str | Path, timeout: float = 60.0) -> str:
        """Run a program in there that must succeed. Return what it said."""
        done = self.done(*words, timeout=timeout)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def property(self, unit: str, name: str) -> str:
        """Return what systemd says of a unit."""
        return self.call("systemctl", "show", unit, "--value", "-p", name).strip()


@contextlib.contextmanager
def booted(place: Path) -> Iterator[Systemd]:
    """Boot one; at the end all of its processes are dead. `place`: an empty directory."""
    group = f"lazyfs-test-{os.getpid()}"
    own = [str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix]
    script = _BOOT.replace("PROGRAM", _PROGRAM)
    namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc"]
    words = [real.tool("unshare"), *namespaces, "bash", "-c", script, "bash", str(place), group, *own]
    with open(place.parent / "systemd.log", "w+b") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:

            def first() -> int | None:
                assert process.poll() is None, Path(log.name).read_text(errors="replace")
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                return next((pid for pid in map(int, children) if _is_systemd(pid)), None)

            one = Systemd(until(first, "systemd is the first process"))
            until(lambda: one.done("systemctl", "is-system-running").returncode == 0, "systemd is up", 60)
            yield one
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            _take_away(place, group)


def _is_systemd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "systemd\n"
    except OSError:
        return False


def _take_away(place: Path, group: str) -> None:
    """Take the control group away, once all that was in it has ended."""
    real.call("mount", "-t", "cgroup2", "none", place)
    try:
        top = place / group

        def gone() -> bool:
            with contextlib.suppress(OSError):
                for directory, _, _ in os.walk(top, topdown=False):
                    os.rmdir(directory)
            return not top.exists()

        until(gone, "nothing runs any more", 30)
    finally:
        real.call("umount", place)
        shutil.rmtree(place, ignore_errors=True)
