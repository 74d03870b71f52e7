"""A pod of the agent's tests: echoes numbered lines on TCP and UDP port 8080, with its name."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import cast


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("peername")
    try:
        while line := await reader.readline():
            writer.write(f"{sys.argv[1]} {peer[0]} ".encode() + line)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)  # 3.11's is no subclass

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        self.transport.sendto(f"{sys.argv[1]} {peer[0]} ".encode() + data, peer)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(serve, None, 8080, backlog=4096)
    await loop.create_datagram_endpoint(Echo, ("0.0.0.0", 8080))
    six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    six.bind(("::", 8080))
    await loop.create_datagram_endpoint(Echo, sock=six)
    print(json.dumps({"ready": True}), flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
