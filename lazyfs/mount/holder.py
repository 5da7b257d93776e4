"""The holder of the FUSE connection: mounts it, starts lazyfsd, and puts another one in its place when it dies.

Readers of a mount wait some milliseconds then, and none fails. What a daemon took from the kernel and did not answer is
sent again to the next one (FUSE_NOTIFY_RESEND, Linux 6.9). The standard library is imported and, of ours, what imports
nothing else: nothing here may break, and nothing here is upgraded with the daemon. Where the kernel can't do it, this
process turns into lazyfsd itself, with a plain mount.

One process is started, the template. It has the code loaded and forks a daemon for each socket that it gets. Of two
daemons one serves, and one is the standby. Each has the other end of such a socket, its leash. Up the leash come "I"
and its process number; "W": it is warm, all is ready that can be; "S": it serves; "E": it ends, and all is taken down.
"A", again and again: it is alive; one that hangs is ended. Down the leash comes once, with the connection, the order to
serve.

A daemon is dead when its main thread is: that one alone reads requests. Other threads may be in the kernel still,
waiting for answers to requests of their own (they mount what lies in the session), which only the next daemon gives.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time

from lazyfs.limits import HUNG_AFTER, SERVE_TIMEOUT, STOP_TIMEOUT
from lazyfs.mount.children import (
    Child,
    died_of,
    is_over,
    is_readable,
    new_leash,
    own_cgroup,
    reap_strangers,
    say,
    send,
    set_priority,
    tell,
)
from lazyfs.mount.deaths import Deaths
from lazyfs.mount.premises import claim, clear_stale, forget, keep, kept, mount, unmount

IS, WARM, SERVES, ENDS, ALIVE = b"I", b"W", b"S", b"E", b"A"
FORK_AT_ONCE, FORK = b"!", b"?"  # to the template: somebody waits for that daemon, or it may load all code first
# Seconds until a standby or template that was lost is begun anew, which costs 0.3 s of processor time; doubled each
# time that one did not even become warm.
_AGAIN, _LONGEST_AGAIN = 1.0, 60.0
_FIRST_STANDBY, _NEXT_STANDBY = 3.0, 0.2  # seconds after a daemon serves: those who wait for it come first
_PR_SET_CHILD_SUBREAPER = 36
_LOOK = 0.25  # seconds between looks whether threads are left of a daemon that has died
_LOOK_CLOSELY, _CLOSELY = 0.0003, 0.1  # seconds between looks at one that is dying, and for how long they are so many
_URGENT, _GENTLE = -10, 10  # nice values: ours, since all readers wait when we are needed; of a template that loads
_SILENT = 15.0  # seconds after which a standby is not relied on
_LAST_THREADS = 2.0  # seconds for dead daemons to have left
_STOPS = (signal.SIGTERM, signal.SIGINT)


class Holder:
    """One connection and whoever serves it. `words`: the daemon's own arguments; `mountpoint` is a directory."""

    def __init__(self, mountpoint: str, words: list[str], ready_fd: int) -> None:
        self._mountpoint = mountpoint
        self._words = words
        self._ready_fd = ready_fd
        self._fuse = -1
        self._greeting = b""
        self._estate = -1
        self._current: Child | None = None
        self._standby: Child | None = None
        self._template: Child | None = None
        self._upgrading = False
        self._planned = False  # the end of the daemon that serves
        self._stopping = False
        self._signals: list[int] = []  # that came and were not looked at
        self._stop_by = float("inf")
        self._served = False  # by anybody, ever
        self._standby_at = float("inf")  # when to begin one
        self._template_at = float("inf")
        self._again = _AGAIN
        self._start_at = float("inf")  # when to put the next one in place
        self._serve_by = float("inf")  # when who was ordered to serve must do so
        self._deaths = Deaths()
        self._looked = time.monotonic()
        self._may_be_gentle = False  # who may not lower a nice value must not raise one
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # -- the connection

    def open(self) -> bool:
        """Mount, and answer INIT, or go on with what a holder before us left. Blocking, 10 s at most.

        False: the kernel can't hand a connection over. Raise OSError, ValueError.
        """
        before = kept()
        if before is not None:
            self._fuse, self._estate, self._greeting = before
            self._served = True
            tell("another holder goes on with what is mounted")
            return True
        clear_stale(self._mountpoint)
        os.makedirs(self._mountpoint, exist_ok=True)
        found = mount(self._mountpoint)
        if found is None:
            return False
        self._fuse, self._greeting = found
        self._estate = keep(self._fuse, self._greeting)
        return True

    # -- daemons

    def _spawn(self) -> Child:
        """Start a template. The first one knows, too, where to say that a daemon is ready."""
        ours, theirs = new_leash()
        passed = [theirs.fileno()]
        words = [sys.executable, "-P", "-m", "lazyfs.mount.daemon", *self._words, "--leash", str(theirs.fileno())]
        if self._ready_fd >= 0:
            passed.append(self._ready_fd)
            words += ["--ready-fd", str(self._ready_fd)]
        pid = os.fork()
        if pid == 0:
            try:
                gentle = self._may_be_gentle and self._current is not None and not self._upgrading
                set_priority(_GENTLE if gentle else 0)  # for an upgrade somebody waits, and it must not seem to hang
                for number in (*_STOPS, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                own_cgroup()
                for fd in passed:
                    os.set_inheritable(fd, True)
                os.execv(words[0], words)
            finally:
                os._exit(127)
        theirs.close()
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1
        child = Child(ours)
        child.name(pid)
        return child

    def _fork(self, how: bytes) -> Child:
        """Have the template fork a daemon, which says who it is."""
        if self._template is None:
            self._template, self._template_at = self._spawn(), float("inf")
        if how == FORK_AT_ONCE:
            set_priority(0, self._template.pid)
        ours, theirs = new_leash()
        say(self._template.leash, how, theirs.fileno(), self._estate)
        theirs.close()
        return Child(ours, silent=0.0)

    def _put_in_place(self) -> None:
        """Have a daemon serve. Its predecessor has ended."""
        self._start_at = float("inf")
        if self._standby is not None and self._standby.silent > _SILENT:
            if self._template is not None and not self._standby.pid:
                self._drop(self._template)  # which does not fork it
                self._template = None
            self._drop(self._standby)  # it hangs, and nobody is to wait for it
            self._standby = None
        try:
            self._current = self._standby or self._fork(FORK_AT_ONCE)
        except OSError as error:  # no memory, no more processes
            tell(f"no lazyfsd can be started: {error}")
            self._start_at = time.monotonic() + _AGAIN
            return
        self._standby, self._standby_at = None, float("inf")
        self._upgrading = False  # this is the new code, where one was coming
        if not self._current.pid and self._template is not None:
            set_priority(0, self._template.pid)  # it may still be loading for this one
        now = time.monotonic()
        self._serve_by, careful = now + SERVE_TIMEOUT, self._deaths.is_loop(now)
        order = {"greeting": self._greeting.hex(), "inherits": self._served, "careful": careful, "holder": os.getpid()}
        say(self._current.leash, json.dumps(order).encode(), self._fuse)

    def _give_up(self) -> None:
        """End who was ordered to serve and does not, or the template that does not fork it."""
        self._serve_by = float("inf")
        hanging = self._current if self._current is not None and self._current.pid else self._template
        if hanging is not None:
            tell(f"lazyfsd {hanging.pid} does not come to serve, and is ended")
            send(hanging, signal.SIGKILL)

    # -- the loop

    def run(self) -> int:
        """Serve until told to stop, or unmounted. Return the exit status."""
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in (*_STOPS, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # daemons leave the template, and come to us
        self._may_be_gentle = set_priority(_URGENT)
        self._put_in_place()
        while True:
            self._wait()
            status = self._step()
            if status is not None:
                self._end()
                return status

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)

    def _obey(self, now: float) -> None:
        """Do what signals say: SIGHUP has a daemon of today's code take over, the others end all."""
        while self._signals:
            number = self._signals.pop(0)
            self._drop_spares()  # they have the code of before, and are not needed at the end
            if number == signal.SIGHUP:
                self._upgrading, self._standby_at = True, now
            elif not self._stopping:
                self._stopping, self._stop_by = True, now + STOP_TIMEOUT
                self._standby_at = self._template_at = self._start_at = float("inf")
                if self._current is not None:
                    send(self._current, signal.SIGTERM)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._fuse, 0)  # POLLERR: it was unmounted
        for child in (self._current, self._standby, self._template):
            if child is not None:
                if child.pid:
                    poll.register(child.pidfd, select.POLLIN)
                if child.canary >= 0 and not child.falling:
                    poll.register(child.canary, select.POLLIN)
                if child.leash.fileno() >= 0:
                    poll.register(child.leash.fileno(), select.POLLIN)
        # The kernel tells when all threads have ended, and their memory is free; that the main one has, it doesn't.
        until = min(self._start_at, self._stop_by, self._serve_by, time.monotonic() + _LOOK)
        if not self._stopping:
            until = min(until, *self._spares_at())
        if self._current is not None and self._current.falling > time.monotonic() - _CLOSELY:
            time.sleep(_LOOK_CLOSELY)
            until = 0.0
        poll.poll(max(0.0, until - time.monotonic()) * 1000)
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass

    def _step(self) -> int | None:
        """Look at everything once. Return the exit status when it is over."""
        now = time.monotonic()
        self._obey(now)
        self._deaths.reap()
        for child in (self._current, self._standby):
            if child is not None:
                self._listen(child)
        self._end_hung(now)
        if self._standby is not None and self._has_ended(self._standby):
            self._standby = None
            self._upgrading = False  # the new code can't even begin: the old one goes on
            self._standby_at = now + self._again
            self._again = min(2 * self._again, _LONGEST_AGAIN)
        if self._template is not None and self._has_ended(self._template):
            self._template.leash.close()
            self._template, self._template_at = None, now + self._again
            self._again = min(2 * self._again, _LONGEST_AGAIN)
        if self._current is not None:
            if self._has_ended(self._current):
                over = self._bury(now)
                if over is not None:
                    return over
        elif self._stopping:
            return 0
        if now >= self._stop_by and self._current is not None:
            send(self._current, signal.SIGKILL)
            self._stop_by = float("inf")
        if now >= self._serve_by:
            self._give_up()
        if now >= self._start_at:
            self._put_in_place()
        serving = self._current is not None and self._current.serving
        if self._upgrading and serving and self._standby is not None and self._standby.warm:
            # What a daemon holds is written down as it comes: there is nothing that it could do at its end.
            assert self._current is not None
            self._upgrading, self._planned = False, True
            send(self._current, signal.SIGKILL)
        if not self._stopping:
            self._ready_spares(now)
        known = [child.pid for child in (self._current, self._standby, self._template) if child is not None]
        reap_strangers({*known, *self._deaths.dying})
        return None

    def _spares_at(self) -> tuple[float, float]:
        """Return when a template, and a standby, are to be begun, where they are wanted."""
        return (
            self._template_at if self._template is None else float("inf"),
            self._standby_at if self._standby is None else float("inf"),
        )

    def _ready_spares(self, now: float) -> None:
        template_at, standby_at = self._spares_at()
        try:
            if now >= template_at:
                self._template, self._template_at = self._spawn(), float("inf")
            if now >= standby_at:
                self._standby, self._standby_at = self._fork(FORK), float("inf")
        except OSError as error:  # no memory, no more processes: who serves goes on
            tell(f"no standby can be started: {error}")
            self._template_at = self._standby_at = now + self._again

    def _listen(self, child: Child) -> None:
        while child.leash.fileno() >= 0:
            try:
                word = child.leash.recv(32)
            except BlockingIOError:
                return
            except OSError:
                word = b""
            if not word:
                child.leash.close()
                child.hung_up = True
            elif word[:1] == IS:
                pid, _, canary = word[1:].partition(b" ")
                child.name(int(pid), int(canary))
                child.silent = -1.0  # until it says that it lives: code of another release may not
                if self._stopping:
                    send(child, signal.SIGTERM)  # it could not be told before
            elif word == ALIVE:
                child.silent = 0.0
            elif word == WARM:
                child.warm, self._again = True, _AGAIN
            elif word == ENDS:
                child.ending = True
            elif word == SERVES:
                self._standby_at = time.monotonic() + (_NEXT_STANDBY if self._served else _FIRST_STANDBY)
                child.serving = self._served = True
                self._serve_by = float("inf")
                self._deaths.served()

    def _end_hung(self, now: float) -> None:
        """End who says nothing any more. Only time in which we looked counts: we may have been stopped ourselves."""
        passed, self._looked = min(now - self._looked, 2 * _LOOK), now
        for child in (self._current, self._standby):
            if child is None or child.silent < 0:
                continue
            child.silent += passed
            hanging = child if child.pid else self._template
            if child.silent > HUNG_AFTER and hanging is not None:
                tell(f"lazyfsd {hanging.pid} hangs, and is ended")
                send(hanging, signal.SIGKILL)
                child.silent = -1.0  # once

    def _has_ended(self, child: Child) -> bool:
        """Tell whether a daemon has ended; then it is left to be reaped, and its last words were heard."""
        if not child.pid:
            return child.hung_up  # it was never forked
        if child.canary >= 0 and not child.falling and is_readable(child.canary):
            child.falling = time.monotonic()
        if not is_readable(child.pidfd) and not is_over(child.pid):
            return False
        self._listen(child)
        child.signal = died_of(child.pid)
        child.forget()
        self._deaths.add_dying(child.pid)
        return True

    def _bury(self, now: float) -> int | None:
        """Note the end of the daemon that served. Return the exit status when none is to follow."""
        child, self._current = self._current, None
        assert child is not None
        self._serve_by = float("inf")
        child.leash.close()
        if self._stopping or child.ending:
            return 0
        if not self._served:
            return 1  # it could not start at all, and said so
        if self._planned:
            self._planned = False
            self._put_in_place()
            return None
        tell(f"lazyfsd {child.pid} has died (signal {child.signal}), another one takes over")
        pause = self._deaths.note(child, now)
        if pause is None:
            return 1
        self._start_at = now + pause
        if not pause:
            self._put_in_place()
        return None

    def _drop_spares(self) -> None:
        for spare in (self._standby, self._template):
            if spare is not None:
                self._drop(spare)
        self._standby = self._template = None

    def _drop(self, spare: Child) -> None:
        spare.leash.close()  # which ends one that has no number yet
        if spare.pid:
            send(spare, signal.SIGKILL)
            spare.forget()
            self._deaths.add_dying(spare.pid)

    def _end(self) -> None:
        self._drop_spares()
        forget()
        unmount(self._mountpoint, self._fuse)
        until = time.monotonic() + _LAST_THREADS
        while self._deaths.dying and time.monotonic() < until:
            self._deaths.reap()
            time.sleep(0.01)


def _refuse(ready_fd: int, text: str) -> int:
    """Say why nothing is started, to whoever started us as well. Return the exit status."""
    tell(text)
    if ready_fd >= 0:
        error = {"class": "StoreLocked", "message": text, "hint": "stop it, or take another --root"}
        try:
            os.write(ready_fd, json.dumps({"error": error}).encode() + b"\n")
        except OSError:
            pass  # nobody waits any more
    return 1


def main(words: list[str]) -> int:
    """Run as `python -m lazyfs.mount.holder MOUNTPOINT READY_FD [lazyfsd's arguments]`. Blocking.

    The directory above the mountpoint is there, and ours alone.
    """
    mountpoint, ready_fd, rest = words[0], int(words[1]), words[2:]
    os.umask(0o077)
    holder = Holder(mountpoint, rest, ready_fd)
    try:
        if not claim(os.path.dirname(mountpoint)):
            return _refuse(ready_fd, f"another lazyfsd serves {mountpoint}")  # a plain one would take its mount away
        held = holder.open()
    except (OSError, ValueError) as error:
        tell(f"the FUSE connection can't be held: {error}")
        held = False
    if held:
        return holder.run()
    ready = ["--ready-fd", str(ready_fd)] if ready_fd >= 0 else []
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lazyfs.mount.daemon", *rest, *ready])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
