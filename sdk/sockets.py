"""Finding the daemon: which socket answers, and what to say when none does.

Owns the order of places to look and the words of the refusal; the paths themselves are `protocol/places`'.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from ..protocol.errors import Code, CorollaError, error
from ..protocol.limits import CONNECT_TIMEOUT_S
from ..protocol.places import (
    SERVICE_SOCKET,
    SOCKET_VARIABLE,
    check_private,
    check_socket_path,
    sockets_to_try,
)


def connected_socket(
    path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] | None = None
) -> tuple[socket.socket, Path]:
    """A socket connected to a daemon, and its path.

    path: the one to use; None looks at `COROLLA_SOCKET`, then at the user's daemon, then at the service.
    Raises `NO_DAEMON` saying what was tried, `PERMISSION_DENIED`, `BAD_CONFIG` for a path too long.
    """
    environment = os.environ if environment is None else environment
    named = path is not None or bool(environment.get(SOCKET_VARIABLE))
    candidates = (Path(path),) if path is not None else sockets_to_try(environment)
    tried: list[tuple[Path, OSError]] = []
    for candidate in candidates:
        try:
            if not named and candidate != SERVICE_SOCKET:
                check_private(candidate.parent)
            return _connect(candidate), candidate
        except OSError as problem:
            tried.append((candidate, problem))
    raise _nobody(tried)


def _connect(path: Path) -> socket.socket:
    check_socket_path(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def _nobody(tried: list[tuple[Path, OSError]]) -> CorollaError:
    for path, problem in tried:
        if problem.errno in (errno.EACCES, errno.EPERM):
            return error(
                Code.PERMISSION_DENIED,
                f"{path}: {problem.strerror}",
                "ask to be added to the group corolla, or use a daemon of your own: corollad",
            )
    words = "; ".join(f"{path}: {_why(problem)}" for path, problem in tried)
    remedy = f"start one with: corollad   or name its socket in {SOCKET_VARIABLE}"
    return error(Code.NO_DAEMON, f"no daemon found: {words}", remedy, tried=[str(path) for path, _ in tried])


def _why(problem: OSError) -> str:
    if problem.errno in (errno.ENOENT, errno.ENOTDIR):
        return "no such socket"
    if problem.errno == errno.ECONNREFUSED:
        return "a socket, but nobody listens on it (the daemon ended without cleaning up)"
    if isinstance(problem, TimeoutError):
        return f"a socket, but nobody answered within {CONNECT_TIMEOUT_S:g} s"
    return problem.strerror or str(problem)
