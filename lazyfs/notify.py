"""What systemd is told by a service of Type=notify (sd_notify(3)): one datagram, and nothing where nobody listens.

A child that inherits the socket's name and tells something is not heard: the units leave NotifyAccess at "main".
"""

from __future__ import annotations

import os
import socket

_SOCKET = "NOTIFY_SOCKET"


def tell(state: str, *fds: int) -> None:
    """Send `state`, such as "READY=1" or "STOPPING=1", with fds, to whoever supervises this process. Raises nothing.

    Doesn't block: a supervisor that doesn't read its socket is told nothing.
    """
    address = os.environ.get(_SOCKET, "")
    if address[:1] not in ("/", "@"):
        return  # not started by systemd, or an address of a kind (vsock) that no service of ours gets
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as ours:
            ours.connect(address)
            socket.send_fds(ours, [state.encode()], fds)
    except OSError:
        return  # then systemd's own time limit says that we did not start
