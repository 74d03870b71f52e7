"""The relay as a process: it drains ExaBGP whatever the launcher does, and ends as a side ends."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path as FilePath

import pytest

LIMIT_S = 60.0


@pytest.fixture
def pair(tmp_path: FilePath) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A relay and the launcher's end of its socket."""
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(LIMIT_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "manager.speaker.relay", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=FilePath(__file__).parents[2],
        )
        link, _ = server.accept()
        link.settimeout(LIMIT_S)
        try:
            yield process, link
        finally:
            link.close()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def test_lines_go_both_ways(pair: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    """And the end of the launcher is the end of the relay."""
    process, link = pair
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"done\n")
    process.stdin.flush()
    assert link.recv(100) == b"done\n"
    link.sendall(b"lbctl-barrier 1\n")
    assert process.stdout.readline() == b"lbctl-barrier 1\n"
    link.shutdown(socket.SHUT_RDWR)
    assert process.wait(LIMIT_S) == 0


def test_exabgp_never_waits_for_the_launcher(
    pair: tuple[subprocess.Popen[bytes], socket.socket],
) -> None:
    """8 MiB of answers are taken while nobody reads them, and none is lost."""
    process, link = pair
    stdin = process.stdin
    assert stdin is not None
    data = b"".join(b"done %07d\n" % number for number in range(8 << 16))
    writer = threading.Thread(target=lambda: (stdin.write(data), stdin.flush()))
    writer.start()
    writer.join(LIMIT_S)
    assert not writer.is_alive(), "the relay stopped reading"
    received = bytearray()
    while len(received) < len(data) and (chunk := link.recv(1 << 16)):
        received += chunk
    assert received == data


def test_without_a_launcher_it_says_so(tmp_path: FilePath) -> None:
    """One line and exit code 1."""
    done = subprocess.run(
        [sys.executable, "-m", "manager.speaker.relay", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=FilePath(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "No such file" in done.stderr and done.stderr.count("\n") == 1
