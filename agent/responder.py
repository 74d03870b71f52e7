"""Answers the managers' probes over UDP, and tells what this node has confirmed.

Rules: before the first `publish` nothing is answered, so that a restarted agent does not look as if
it had confirmed nothing (the managers keep what its predecessor had). An answer is never larger
than its request and goes only to who could sign it. What requests say of dead nodes goes to
core/downset; `on_down` is called in the event loop when the resulting set changes.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

import structlog

from lbctl.core import names, probe
from lbctl.core.changelog import ChangeLog
from lbctl.core.downset import DownSet, hear, heard, resolve
from lbctl.core.keys import Key, KeyRing, Keys
from lbctl.core.model import Address, Behind
from lbctl.errors import ConfigError, DataplaneError, MessageError
from lbctl.keyfiles import read_keys
from lbctl.udp import UdpSocket

_COOKIE_S: Final = 2.0  # a cookie is good for one to two of these
_RELOAD_S: Final = 1.0
_log = structlog.get_logger()


class Responder:
    """One agent's end of the probe protocol.

    node: this node's name. keys: the parsed Secret. boot: changes with every start of the process
    and rises (time_ns). nodes: returns the names of all nodes of the cluster. host: returns the
    name of the node that has an address, "" if none has. on_down: takes the
    names of the nodes whose endpoints take no new flows, each time that set changes. down: what it
    was when this process began, from the snapshot: a node may have come back meanwhile.
    """

    def __init__(
        self,
        node: str,
        keys: Keys,
        boot: int,
        nodes: Callable[[], Iterable[str]],
        on_down: Callable[[frozenset[str]], None],
        down: frozenset[str] = frozenset(),
        host: Callable[[str], str] = lambda _: "",
    ) -> None:
        self.node = node
        self.answered = 0
        self.refused = 0
        self.heard_s: float | None = None  # monotonic, the last authentic request
        self._ring: KeyRing = keys.node(node)
        self._log = ChangeLog(boot)
        self._nodes, self._host = nodes, host
        self._on_down = on_down
        self._down = DownSet(down=down)
        self._published: tuple[int, int, int] | None = None  # config generation, digest, count
        self._cookie_secret = os.urandom(16)
        self._cookie = lru_cache(maxsize=2)(self._made_cookie)  # the same for hundreds of probes
        self._socket: UdpSocket | None = None

    @property
    def down(self) -> frozenset[str]:
        """Names of the nodes whose endpoints take no new flows."""
        return self._down.down

    @property
    def generation(self) -> int:
        """Generation of what is confirmed, as the answers carry it."""
        return self._log.generation

    @property
    def port(self) -> int:
        """The UDP port, 0 before `start`."""
        return self._socket.port if self._socket else 0

    def publish(
        self, confirmed: Mapping[Address, Behind], digest: int, config_generation: int
    ) -> None:
        """Tell the managers from now on what this node forwards, the whole of it.

        confirmed: EIP → whether a ready endpoint of it is on this node. digest: of the table.
        """
        self._log.replace(confirmed)
        self._published = (config_generation, digest, len(confirmed))

    def set_keys(self, keys: Keys) -> None:
        """Use these keys from now on."""
        self._ring = keys.node(self.node)

    async def start(self, host: str = "", port: int = names.PROBE_PORT) -> None:
        """Listen on UDP; raises DataplaneError if the port cannot be had."""
        try:
            self._socket = UdpSocket(host, port)
        except OSError as error:
            raise DataplaneError(f"UDP port {port} cannot be had: {error}") from error
        asyncio.get_running_loop().add_reader(self._socket.socket, self._receive, self._socket)

    def close(self) -> None:
        """Stop answering."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.socket)
            self._socket.close()
            self._socket = None

    def _receive(self, udp: UdpSocket) -> None:
        for data, source in udp.receive():
            if self._published is None:
                continue
            try:
                reply = self._reply(data, source[0], self._published)
            except MessageError:
                self.refused += 1
                continue
            if udp.send(reply, source):
                self.answered += 1

    def _reply(self, data: bytes, source: str, published: tuple[int, int, int]) -> bytes:
        kind, _ = probe.peek(data)
        if kind == probe.Kind.PAGE_REQUEST:
            wanted, key = probe.decode_page_request(data, self._ring)
            return probe.encode_page(self._log.page(wanted), key)
        request, key = probe.decode_request(data, self._ring)
        return self._answer(request, source, key, published)

    def _answer(
        self, request: probe.Request, source: str, key: Key, published: tuple[int, int, int]
    ) -> bytes:
        now_s = time.monotonic()
        self.heard_s = now_s
        epoch = int(now_s / _COOKIE_S)
        if request.cookie in (self._cookie(epoch), self._cookie(epoch - 1)):
            self._hear(request, source, now_s)
        config_generation, digest, count = published
        answer = probe.Answer(
            request.nonce,
            self.node,
            self._log.boot,
            self._cookie(epoch),
            config_generation,
            self._log.generation,
            digest,
            count,
            heard(self._down, now_s),
        )
        return probe.encode_answer(answer, key)

    def _made_cookie(self, epoch: int) -> int:
        mac = hmac.digest(self._cookie_secret, epoch.to_bytes(8, "big"), "sha256")
        return int.from_bytes(mac[:8], "big")

    def _hear(self, request: probe.Request, source: str, now_s: float) -> None:
        """Requests come many times a second, so no timer is needed to notice a silent manager."""
        before = self._down.down
        known = hear(self._down, request, now_s, self._host(source))
        self._down = resolve(known, self._nodes(), now_s)
        if self._down.down != before:
            _log.info("down_set_changed", nodes=sorted(self._down.down))
            self._on_down(self._down.down)


async def follow_keys(
    directory: Path, on_keys: Callable[[Keys], None], known: Keys | None = None
) -> None:
    """Read the keys each second and hand on each new, valid set; ends only by cancellation.

    kubelet replaces the files by renaming a directory, so what counts is the content.
    """
    complaint = ""
    while True:
        try:
            keys = read_keys(directory)
            complaint = ""
            if keys != known:
                known = keys
                on_keys(keys)
        except ConfigError as error:
            if str(error) != complaint:
                complaint = str(error)
                _log.error("probe_keys_refused", error=complaint)
        await asyncio.sleep(_RELOAD_S)
