"""A router of the lab that speaks UPnP on its inner side, and forwards what it is asked to forward."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ..network.router import Router, upnp
from .lab import Host
from .link import inside

CHAIN = """
table ip lab {
    chain asked { type nat hook prerouting priority dstnat; }
}
flush chain ip lab asked
"""


@dataclass
class Gateway(Router):
    """One whose mappings are its NAT's. namespace: where that is."""

    namespace: str = field(default="", kw_only=True)

    def answer(self, action: str, told: dict[str, str]) -> tuple[dict[str, str], tuple[int, str] | None]:
        values, failure = super().answer(action, told)
        if action in ("AddPortMapping", "DeletePortMapping") and failure is None:
            self._forward()
        return values, failure

    def _forward(self) -> None:
        """Make the NAT forward just what it is asked for now."""
        rules = [
            f'add rule ip lab asked iifname "eth0" tcp dport {outside} dnat to {address}:{port}'
            for outside, (address, port, _) in self.mappings.items()
        ]
        text = CHAIN + "".join(f"{rule}\n" for rule in rules)
        command = ["ip", "netns", "exec", self.namespace, "nft", "-f", "-"]
        subprocess.run(command, input=text, text=True, check=True)


@contextmanager
def gateway_of(host: Host) -> Iterator[Gateway]:
    """The router next to a host answers it by UPnP until the block ends."""
    gateway = Gateway(host.public_address, namespace=host.router)
    with ExitStack() as stack:
        with inside(host.router):
            stack.enter_context(upnp(gateway, host.gateway))
        yield gateway
