"""Two TAP interfaces; what goes into one comes out of the other after a time: NEAR FAR SECONDS.

Prints `ready` when both exist. They vanish with this process.
"""

import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def open_tap(name: str) -> int:
    """Make a TAP interface; return the descriptor of its frames."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return file


def main() -> None:
    near, far = map(open_tap, sys.argv[1:3])
    delay = float(sys.argv[3])
    others = {near: far, far: near}
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    print("ready", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for file in select.select(others, [], [], pause)[0]:
            waiting.append((time.monotonic() + delay, others[file], os.read(file, 65536)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, file, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # an interface that is not up yet loses frames, like any other
                os.write(file, frame)


if __name__ == "__main__":
    main()
