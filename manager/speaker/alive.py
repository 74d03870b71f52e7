"""Is the launcher at work? The speaker container's liveness probe.

Rules: it asks the launcher's event loop over a unix socket, so the host gets no port more, and it
imports next to nothing, for it starts anew at every probe. Whether ExaBGP hangs is the launcher's
own to see: this only tells of a launcher that does not come round any more.

Usage: python -m manager.speaker.alive [DIRECTORY]. Exit code 0: it answered, 1: it did not.
"""

from __future__ import annotations

import socket
import sys
from typing import Final

from lbctl.core.names import SPEAKER_SOCKET_DIR

HEALTH_SOCKET: Final = "health.sock"
ANSWER: Final = b"ok\n"
ANSWER_S: Final = 8.0


def main() -> int:
    """Ask once."""
    directory = sys.argv[1] if len(sys.argv) > 1 else SPEAKER_SOCKET_DIR
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(ANSWER_S)
        try:
            asking.connect(f"{directory}/{HEALTH_SOCKET}")
            said = asking.recv(len(ANSWER))
        except OSError as error:
            print(f"the speaker does not answer: {error}", file=sys.stderr)
            return 1
    return 0 if said == ANSWER else 1


if __name__ == "__main__":
    sys.exit(main())
