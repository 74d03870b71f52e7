"""Logging of every process: one JSON line per event, or coloured lines on a terminal.

Rules: call `setup()` once at process start; everywhere else `structlog.get_logger()`. An event is a
short snake_case name and key/values, never a formatted sentence. Secrets are never values.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog


def setup(level: str = "info", stream: TextIO | None = None) -> None:
    """Configure structlog and the standard library's logging.

    level: debug, info, warning or error. stream: where lines go, stderr by default. Lines are JSON
    unless the stream is a terminal. Standard-library records (aiohttp, asyncio) take the same way.
    """
    out = stream if stream is not None else sys.stderr
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if out.isatty():
        last: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer()]
    else:
        last = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    # One line per HTTP request of our own would drown everything else.
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
