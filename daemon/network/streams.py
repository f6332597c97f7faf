"""A stream of libp2p as one of ours: the muxer's exceptions become `PEER_LOST`.

Which connection a stream belongs to, and which protocol was agreed on, is decided before.
"""

from __future__ import annotations

from typing import Final

from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from ...protocol.errors import Code, CorollaError, error
from .yamux import Yamux, YamuxStream

_RECEIVE_BYTES: Final = 1024 * 1024


class Libp2pStream:
    """One stream of a connection; see `seam.Stream`."""

    __slots__ = ("_muxed", "_peer", "_protocol")

    def __init__(self, muxed: YamuxStream, peer: str, protocol: str) -> None:
        self._muxed = muxed
        self._peer = peer
        self._protocol = protocol

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def connection(self) -> Yamux:
        """The muxer that carries it."""
        return self._muxed.muxed_conn

    async def send(self, data: bytes) -> None:
        try:
            await self._muxed.write(data)
        except MuxedStreamError as failure:
            raise self._lost(failure) from failure

    async def receive(self) -> bytes:
        try:
            return await self._muxed.read(_RECEIVE_BYTES)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as failure:
            raise self._lost(failure) from failure

    async def close(self) -> None:
        self._muxed.finish()
        self._muxed.linger()

    def reset(self) -> None:
        self._muxed.break_off()

    def _lost(self, failure: Exception) -> CorollaError:
        return error(Code.PEER_LOST, f"lost peer {self._peer} during {self._protocol}: {failure}")
