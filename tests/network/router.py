"""A router for tests: answers UPnP on one interface, as a home's does on its LAN."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GROUP, PORT = "239.255.255.250", 1900
LOOPBACK = "127.0.0.1"
DEVICE = "urn:schemas-upnp-org:device:{}:1"
SERVICE = "urn:schemas-upnp-org:service:{}:1"
CONNECTION = SERVICE.format("WANIPConnection")


@dataclass
class Router:
    """What it holds, and how it behaves. mappings: outside port → (address, port, seconds)."""

    external_ip: str = "11.0.0.9"
    mappings: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    taken: tuple[int, ...] = ()
    only_permanent: bool = False

    def answer(self, action: str, told: dict[str, str]) -> tuple[dict[str, str], tuple[int, str] | None]:
        """What comes back of a call: values, or code and text of an error."""
        if action == "GetStatusInfo":
            return {"NewConnectionStatus": "Connected", "NewLastConnectionError": "", "NewUptime": "9"}, None
        if action == "GetExternalIPAddress":
            return {"NewExternalIPAddress": self.external_ip}, None
        outside = int(told.get("NewExternalPort", "0"))
        if action == "AddPortMapping":
            if outside in self.taken:
                return {}, (718, "ConflictInMappingEntry")
            if self.only_permanent and told["NewLeaseDuration"] != "0":
                return {}, (725, "OnlyPermanentLeasesSupported")
            inside = (told["NewInternalClient"], int(told["NewInternalPort"]), int(told["NewLeaseDuration"]))
            self.mappings[outside] = inside
            return {}, None
        if action == "DeletePortMapping" and self.mappings.pop(outside, None) is not None:
            return {}, None
        return {}, (714, "NoSuchEntryInArray")


@contextmanager
def upnp(router: Router, address: str = LOOPBACK) -> Iterator[Router]:
    """The router answers at this address of its own until the block ends."""
    server = ThreadingHTTPServer((address, 0), _handler(router))
    server.daemon_threads = True
    searches = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    searches.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    searches.bind((GROUP, PORT))
    group = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(address))
    searches.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    searches.settimeout(0.1)
    over = threading.Event()
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.05,)),
        threading.Thread(target=_be_found, args=(searches, server.server_address, over)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield router
    finally:
        over.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()
        searches.close()


def _be_found(searches: socket.socket, server: Any, over: threading.Event) -> None:
    kind = DEVICE.format("InternetGatewayDevice")
    lines = ["HTTP/1.1 200 OK", f"ST: {kind}", f"USN: uuid:router::{kind}", "EXT:", "SERVER: test"]
    lines += ["CACHE-CONTROL: max-age=120", f"LOCATION: http://{server[0]}:{server[1]}/device.xml", "", ""]
    while not over.is_set():
        try:
            _, asker = searches.recvfrom(4096)
        except TimeoutError:
            continue
        searches.sendto("\r\n".join(lines).encode(), asker)


def _service(kind: str) -> str:
    return (
        f"<serviceList><service><serviceType>{SERVICE.format(kind)}</serviceType><serviceId>{kind}</serviceId>"
        "<controlURL>/call</controlURL><eventSubURL>/events</eventSubURL><SCPDURL>/scpd.xml</SCPDURL>"
        "</service></serviceList>"
    )


def _device(kind: str, inside: str) -> str:
    return f"<device><deviceType>{DEVICE.format(kind)}</deviceType>{inside}</device>"


def _description() -> str:
    connection = _device("WANConnectionDevice", _service("WANIPConnection"))
    wan = _device(
        "WANDevice", _service("WANCommonInterfaceConfig") + f"<deviceList>{connection}</deviceList>"
    )
    gateway = _device("InternetGatewayDevice", f"<deviceList>{wan}</deviceList>")
    return f'<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">{gateway}</root>'


def _handler(router: Router) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, _description())

        def do_POST(self) -> None:
            said = self.rfile.read(int(self.headers["Content-Length"])).decode()
            action = self.headers["SOAPAction"].strip('"').rpartition("#")[2]
            told = dict(re.findall(r"<(New\w+)>([^<]*)<", said))
            values, failure = router.answer(action, told)
            if failure is not None:
                code, text = failure
                why = f"<errorCode>{code}</errorCode><errorDescription>{text}</errorDescription>"
                detail = f"<detail><UPnPError>{why}</UPnPError></detail>"
                self._reply(500, _envelope(f"<s:Fault>{detail}</s:Fault>"))
                return
            body = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
            response = f'<u:{action}Response xmlns:u="{CONNECTION}">{body}</u:{action}Response>'
            self._reply(200, _envelope(response))

        def _reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


def _envelope(body: str) -> str:
    start = '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/">'
    return f"{start}<s:Body>{body}</s:Body></s:Envelope>"
