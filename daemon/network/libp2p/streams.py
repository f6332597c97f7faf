"""A stream of libp2p as one of ours: the muxer's exceptions become `PEER_LOST`.

Which connection a stream belongs to, and which protocol was agreed on, is decided before.
"""

from __future__ import annotations

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import MIB
from ..room import Room
from ..traffic import PIECE_BYTES, Lane, Traffic
from ..wire.yamux import Yamux, YamuxStream


class Libp2pStream:
    """One stream of a connection; see `seam.Stream`."""

    __slots__ = ("_lane", "_muxed", "_peer", "_protocol", "_room", "_sending")

    def __init__(self, muxed: YamuxStream, peer: str, protocol: str, traffic: Traffic) -> None:
        self._muxed = muxed
        self._peer = peer
        self._protocol = protocol
        self._lane = traffic.lane(muxed.get_remote_address())
        allowance = muxed.muxed_conn.allowance
        self._room = allowance.room if allowance is not None else Room()
        self._sending = trio.StrictFIFOLock()  # of messages that leave in pieces

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def room(self) -> Room:
        return self._room

    @property
    def connection(self) -> Yamux:
        """The muxer that carries it."""
        return self._muxed.muxed_conn

    async def send(self, data: bytes) -> None:
        try:
            if self._lane is None:
                await self._muxed.write(data)
            elif self._lane.is_held or self._sending.locked():
                await self._send_paced(data, self._lane)
            else:
                await self._lane.leave(len(data))
                await self._muxed.write(data)
        except MuxedStreamError as failure:
            raise self._lost(failure) from failure

    async def _send_paced(self, data: bytes, lane: Lane) -> None:
        async with self._sending:
            for at in range(0, len(data), PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                await lane.leave(len(piece))
                await self._muxed.write(piece)

    async def receive(self, limit: int = MIB) -> bytes:
        try:
            data = await self._muxed.read(limit)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as failure:
            raise self._lost(failure) from failure
        if self._lane is not None:
            self._lane.arrived(len(data))
        return data

    async def close(self) -> None:
        self._muxed.finish()
        self._muxed.linger()

    def reset(self) -> None:
        self._muxed.break_off()

    def _lost(self, failure: Exception) -> CorollaError:
        return error(Code.PEER_LOST, f"lost peer {self._peer} during {self._protocol}: {failure}")
