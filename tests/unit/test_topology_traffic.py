"""The pure parts of the load driver, and reading pid files."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time

import pytest

from lbctl.lab import processes
from lbctl.lab.asking import parse_answer, take_response
from lbctl.lab.load import Load, parse_report
from lbctl.lab.traffic import Flow, FlowRecord


def answer(body: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-LENGTH: {len(body)}\r\n\r\n{body}".encode()


def test_responses_are_cut_off_one_by_one_at_any_boundary() -> None:
    stream = answer("web-1 203.0.113.10 /n/1\n") + answer("web-1 203.0.113.10 /n/2\n")
    for step in (1, 7, len(stream)):
        buffer, bodies = bytearray(), []
        for at in range(0, len(stream), step):
            buffer += stream[at : at + step]
            while (body := take_response(buffer)) is not None:
                bodies.append(parse_answer(body))
        assert bodies == [("web-1", "203.0.113.10", f"/n/{n}") for n in (1, 2)]
        assert not buffer


@pytest.mark.parametrize(
    "bad",
    [
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_answer_is_an_error(bad: bytes) -> None:
    with pytest.raises(ValueError):
        take_response(bytearray(bad))


class Sink(asyncio.Transport):
    """A connection's other end that only notes what was written."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("203.0.113.10", 40000)})
        self.written: list[bytes] = []

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self.written.append(data)

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def asked(questions: int) -> Flow:
    """A flow with that many questions sent and all but the last answered by web-1."""
    flow = Flow(FlowRecord(0), 0.01, "eip")
    flow.connection_made(Sink())
    for number in range(1, questions + 1):
        flow.tick(flow.due_s)
        if number < questions:
            flow.data_received(answer(f"web-1 203.0.113.10 /n/{number}"))
    return flow


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("web-1 203.0.113.10 /n/3", ""),
        ("web-1 203.0.113.10 /n/2", "answer '/n/2' instead of /n/3"),
        ("web-2 203.0.113.10 /n/3", "moved to web-2 (sees 203.0.113.10)"),
        ("web-1 192.0.2.21 /n/3", "moved to web-1 (sees 192.0.2.21)"),
        ("garbage", "answer '' instead of /n/3"),
    ],
)
def test_a_flow_knows_what_broke_it(body: str, why: str) -> None:
    flow = asked(3)
    flow.data_received(answer(body))
    assert flow.record.broken == why
    assert flow.record.sent == 3


def test_a_flow_counts_duplicates_resets_ends_and_silence() -> None:
    twice = asked(2)
    twice.data_received(answer("web-1 203.0.113.10 /n/2") * 2)
    assert (twice.record.duplicates, twice.record.broken) == (1, "answer /n/2 without a question")
    reset = asked(2)
    reset.connection_lost(ConnectionResetError("by peer"))
    assert reset.record.broken == "reset: by peer"
    closed = asked(2)
    closed.connection_lost(None)
    assert closed.record.broken == "closed by the other side"
    silent = asked(2)
    silent.end(time.monotonic())
    assert silent.record.broken == "no answer"
    fine = asked(2)
    fine.data_received(answer("web-1 203.0.113.10 /n/2"))
    fine.end(time.monotonic())
    fine.connection_lost(None)
    assert fine.record.broken == ""


def test_a_flow_waits_for_its_answer() -> None:
    flow = asked(1)
    flow.tick(flow.due_s + 100)
    assert flow.record.sent == 1


def test_the_report_measures_outage_from_a_mark() -> None:
    report = parse_report(
        {
            "flows": [],
            "datagrams": [],
            "received": [(10.0, "w", 5)],
            "probes": [(10.4, 1.0, "", "timed out"), (9.0, 1.0, "", "early"), (10.9, 0.1, "w", "")],
            "marks": [("cut", 10.0), ("later", 10.5)],
            "started_s": 8.0,
            "ended_s": 12.0,
        }
    )
    assert report.outage_s("cut") == pytest.approx(0.4)
    assert report.outage_s("later") == 0.0
    assert len(report.failed_probes()) == 2


def test_pid_lines() -> None:
    fields = " ".join(["0"] * 18)
    line = f"42 (a ) (b) S {fields} 777 1 2 3"
    assert processes.parse_stat(line) == (processes.Pid(42, 777), "S")
    for bad in ("", "42", "x (y) S 1 2", "42 (y) S 1 2"):
        assert processes.parse_stat(bad) is None
    me = processes.identify(os.getpid())
    assert me is not None and me.alive()
    assert not processes.Pid(me.pid, me.started - 1).alive()


def test_what_waits_for_its_answer_at_the_end_is_told() -> None:
    """A listener that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as silent:
        port = str(silent.getsockname()[1])
        words = ("127.0.0.1", port, "--probes", "50", "--timeout", "0.8")
        process = subprocess.Popen(
            [sys.executable, "-m", "lbctl.lab.traffic", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with Load(process) as load:
            silent.settimeout(30)
            taken = [silent.accept()[0] for _ in range(5)]  # none of them is over yet
            report = load.stop()
        for one in taken:
            one.close()
    assert len(report.probes) >= 5
    assert all("timed out" in probe.error for probe in report.probes)
