"""Corolla: people who each own a little hardware run one large language model together.

This root re-exports the SDK's entrances, and imports them only when they are used, so that
`import corolla` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .protocol.errors import CorollaError as CorollaError
    from .sdk.client import aconnect as aconnect
    from .sdk.client import connect as connect

__version__ = "0.1.0"
__all__ = ["CorollaError", "__version__", "aconnect", "connect"]


def __getattr__(name: str) -> Any:
    if name in ("connect", "aconnect"):
        from .sdk import client

        return getattr(client, name)
    if name == "CorollaError":
        from .protocol.errors import CorollaError

        return CorollaError
    raise AttributeError(f"module 'corolla' has no attribute {name!r}")
