"""Where things lie on this machine: configuration, state, caches, and the control socket.

The daemon and the SDK have to agree on these paths before they can talk, so both ask here. This computes
paths from the environment and looks at nothing on disk; `check_private` alone does, since a socket in a
folder of somebody else is not ours. Programs that start a daemon of their own name its folders by flags.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import platformdirs

from .errors import Code, error

SOCKET_VARIABLE: Final = "COROLLA_SOCKET"
SOCKET_NAME: Final = "control.sock"
MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path of Linux holds 108 with its closing zero

SERVICE_SOCKET: Final = Path("/run/corolla") / SOCKET_NAME
SERVICE_CONFIG: Final = Path("/etc/corolla/config.toml")
SERVICE_STATE: Final = Path("/var/lib/corolla")


def user_config_file() -> Path:
    """The configuration of this user's own daemon."""
    return platformdirs.user_config_path("corolla") / "config.toml"


def user_state_folder() -> Path:
    """Identity, swarm and lock of this user's own daemon."""
    return platformdirs.user_state_path("corolla")


def user_cache_folder() -> Path:
    """Models that were fetched or converted; may be deleted at any time."""
    return platformdirs.user_cache_path("corolla")


def user_socket(environment: Mapping[str, str] | None = None) -> Path:
    """Where this user's own daemon listens unless told otherwise."""
    return user_sockets(environment)[0]


def user_sockets(environment: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """Where this user's daemon may listen, likeliest first.

    In `XDG_RUNTIME_DIR` if it is set and its path is short enough, else in a folder named after the user
    below the temporary directory. A program without a login session (cron, a container) lacks the variable
    that the daemon had, or has one that it lacked, so whoever looks for the daemon tries all of these.
    """
    environment = os.environ if environment is None else environment
    below = [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - check_private guards it
    candidates = [folder / f"corolla-{os.getuid()}" / SOCKET_NAME for folder in below]
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        candidates.insert(0, Path(runtime) / "corolla" / SOCKET_NAME)
    short = [path for path in candidates if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES]
    return tuple(dict.fromkeys(short))


def sockets_to_try(environment: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """Where to look for a daemon: `COROLLA_SOCKET` alone if it is set, else the user's, then the service's."""
    environment = os.environ if environment is None else environment
    if named := environment.get(SOCKET_VARIABLE):
        return (Path(named),)
    return (*user_sockets(environment), SERVICE_SOCKET)


def check_socket_path(path: Path) -> None:
    """Raise `BAD_CONFIG` if the system cannot name a socket so."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        raise error(
            Code.BAD_CONFIG,
            f"the socket path {path} has {size} bytes, at most {MAX_SOCKET_PATH_BYTES} work",
            "choose a shorter one with --socket or COROLLA_SOCKET",
        )


def check_private(folder: Path) -> None:
    """Raise `PERMISSION_DENIED` unless this folder is the user's own and closed to others.

    Below a temporary directory anybody may have made a folder of the expected name before us.
    Raises OSError if it cannot be looked at.
    """
    status = folder.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or mode & 0o077:
        raise error(
            Code.PERMISSION_DENIED,
            f"{folder} belongs to uid {status.st_uid} with mode {mode:04o}, expected uid {os.getuid()} and 0700",
            f"remove it, or name another place with {SOCKET_VARIABLE} or --socket",
        )
