"""`python -m lbctl.lab.apiserver`: the embedded API server and its controllers in one process.

Prints nothing but log lines; writes `--ready-file` (its URL) once it answers. SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from lbctl.lab.apiserver import bootstrap
from lbctl.lab.apiserver.api import Api
from lbctl.lab.apiserver.auth import Tokens
from lbctl.lab.apiserver.journal import Journal
from lbctl.lab.apiserver.server import Server
from lbctl.lab.apiserver.store import Store
from lbctl.lab.cluster.handle import SERVICE_CIDRS
from lbctl.lab.cluster.pki import Pki
from lbctl.lab.controllers.run import run as run_controllers

log = structlog.get_logger()
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)
_BACKLOG: Final = 1024
_SHUTDOWN_S: Final = 0.2
_VERSIONS_PER_S: Final = 1000  # resourceVersions begin at the clock times this


def main() -> None:
    """Parse the command line and serve until SIGTERM or SIGINT."""
    args = _arguments()
    _configure_log()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # a parent may have left them blocked
    asyncio.run(_serve(args))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lbctl.lab.apiserver",
        description="A small Kubernetes API server with the controllers that the lab needs.",
    )
    add = parser.add_argument
    add("--pki", type=Path, required=True, help="directory made by lbctl.lab.cluster.pki.create")
    add("--address", default="127.0.0.1", help="where to listen (default %(default)s)")
    add("--port", type=int, default=6443, help="0 takes any free one (default %(default)s)")
    add("--service-cidrs", default=SERVICE_CIDRS, help="addresses of Services (%(default)s)")
    add("--history", type=int, default=10_000, help="events kept per resource (%(default)s)")
    add("--state", type=Path, help="file that keeps all objects over a restart")
    add("--ready-file", type=Path, help="written with the URL once the server answers")
    add("--no-controllers", action="store_true", help="serve the API and nothing else")
    add("--node-grace-s", type=float, default=40.0, help="lease age that makes a node unknown")
    return parser.parse_args()


async def _serve(args: argparse.Namespace) -> None:
    pki = Pki(args.pki)
    store = Store(int(time.time() * _VERSIONS_PER_S), args.history)
    api = Api(store, args.service_cidrs)
    journal = Journal(args.state) if args.state else None
    if journal is not None:
        journal.load(store)
        api.resume()
        journal.start(store)

    def account(namespace: str, name: str) -> str | None:
        item = store.get("serviceaccounts", namespace, name)
        return item.obj["metadata"]["uid"] if item else None

    server = Server(api, Tokens(pki, account), f"{args.address}:{args.port}")
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=_SHUTDOWN_S)
    port = await _listen(runner, pki, args)
    bootstrap.create(api, args.address, port)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, ended.set)
    async with asyncio.TaskGroup() as group:
        tasks = []
        if not args.no_controllers:
            controllers = run_controllers(api, pki.ca_cert.read_text(), args.node_grace_s)
            tasks.append(group.create_task(controllers))
        if args.ready_file:
            _tell(args.ready_file, args.address, port)
        log.info("api_server_ready", address=args.address, port=port)
        await ended.wait()
        for task in tasks:
            task.cancel()
    await runner.cleanup()
    if journal is not None:
        journal.close()


def _configure_log() -> None:
    """JSON lines on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


async def _listen(runner: web.AppRunner, pki: Pki, args: argparse.Namespace) -> int:
    """Serve TLS; the port."""
    await runner.setup()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server_cert, pki.server_key)
    await web.TCPSite(
        runner, args.address, args.port, ssl_context=context, backlog=_BACKLOG
    ).start()
    port: int = runner.addresses[0][1]
    return port


def _tell(ready_file: Path, address: str, port: int) -> None:
    host = f"[{address}]" if ":" in address else address
    temporary = ready_file.with_suffix(".new")
    temporary.write_text(f"https://{host}:{port}\n")
    temporary.replace(ready_file)


if __name__ == "__main__":
    main()
