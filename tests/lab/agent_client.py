"""A client of the agent's tests. Commands are JSON lines on stdin, answers JSON lines on stdout.

{"ask": [HOST, PORT], "count": N, "udp": bool}: N requests on connections of their own; the answers.
{"open": [HOST, PORT], "count": N}: opens N connections that each send a numbered line every 50 ms
and must get it back, in order, within `stall` seconds. {"report": true}: their state.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from typing import Any

STALL_S = 20.0


class Flow:
    def __init__(self) -> None:
        self.pod = ""
        self.seen = ""
        self.count = 0
        self.gap_s = 0.0
        self.broken = ""
        self.port = 0

    async def run(self, host: str, port: int, opened: asyncio.Semaphore) -> None:
        try:
            reader, writer = await asyncio.open_connection(host, port)
            self.port = writer.get_extra_info("sockname")[1]
            while True:
                sent = time.monotonic()
                writer.write(f"{self.count}\n".encode())
                line = await asyncio.wait_for(reader.readline(), STALL_S)
                words = line.decode().split()
                if len(words) != 3 or words[2] != str(self.count):
                    raise ConnectionError(f"answer {line!r} to {self.count}")
                if self.pod and self.pod != words[0]:
                    raise ConnectionError(f"moved from {self.pod} to {words[0]}")
                if not self.pod:
                    opened.release()
                self.pod, self.seen = words[0], words[1]
                self.gap_s = max(self.gap_s, time.monotonic() - sent)
                self.count += 1
                await asyncio.sleep(0.05)
        except (OSError, TimeoutError) as error:
            self.broken = f"{type(error).__name__}: {error}"
            opened.release()


async def ask(host: str, port: int, limit_s: float) -> dict[str, Any]:
    started = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"hello\n")
            words = (await reader.readline()).decode().split()
            writer.close()
        answer = {"pod": words[0], "seen": words[1]} if words else {"error": "closed"}
    except TimeoutError:
        answer = {"error": "timeout"}
    except OSError as error:
        answer = {"error": type(error).__name__}
    return {**answer, "took_s": time.monotonic() - started}


async def ask_udp(host: str, port: int, limit_s: float) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setblocking(False)
        await loop.sock_connect(udp, (host, port))
        try:
            await loop.sock_sendall(udp, b"hello\n")
            data = await asyncio.wait_for(loop.sock_recv(udp, 4096), limit_s)
            words = data.decode().split()
            return {"pod": words[0], "seen": words[1], "took_s": time.monotonic() - started}
        except TimeoutError:
            return {"error": "timeout", "took_s": time.monotonic() - started}
        except OSError as error:
            return {"error": type(error).__name__, "took_s": time.monotonic() - started}


async def main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    flows: list[Flow] = []
    tasks = []
    while line := await reader.readline():
        command = json.loads(line)
        result: Any = None
        if "ask" in command:
            one = ask_udp if command.get("udp") else ask
            limit_s = command.get("limit_s", 10.0)
            result = []
            host, port = command["ask"]
            for start in range(0, command["count"], 50):
                number = min(50, command["count"] - start)
                result += await asyncio.gather(*(one(host, port, limit_s) for _ in range(number)))
        elif "open" in command:
            opened = asyncio.Semaphore(0)
            host, port = command["open"]
            for number in range(command["count"]):
                flows.append(Flow())
                tasks.append(loop.create_task(flows[-1].run(host, port, opened)))
                if number % 20 == 19:
                    await asyncio.sleep(0.02)
            for _ in range(command["count"]):
                await opened.acquire()
            result = len(flows)
        elif "report" in command:
            result = [
                {k: getattr(f, k) for k in ("pod", "seen", "count", "gap_s", "broken", "port")}
                for f in flows
            ]
        print(json.dumps({"result": result}), flush=True)


asyncio.run(main())
