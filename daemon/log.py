"""Structured logs on stderr: lines for people in a terminal, JSON for machines. It decides nothing else."""

from __future__ import annotations

import logging
import sys

import structlog


def set_up_logging(level: str, form: str) -> None:
    """level: debug, info, warning or error. form: text, json, or auto (text in a terminal)."""
    as_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if as_text
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.getLogger().setLevel(logging.CRITICAL)  # libraries' own logs are not for our users
