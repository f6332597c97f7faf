"""An archive of what `doctor` saw, for whoever helps: without keys, tokens and texts, and with addresses masked.

`Redactor` is the one place that decides what leaves the machine. It lets words through and cuts out what it
knows to be secret, by the name of a field and by its form; what looks like neither word nor name is cut too.
"""

from __future__ import annotations

import io
import ipaddress
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import Code, error
from .output import complete

LEFT_OUT: Final = "<left out>"
# Of settings, statuses, events and errors: what lets one in, what users wrote or were written, and their names.
SECRET_FIELDS: Final = frozenset(
    {
        "join", "join_command", "token", "proof", "charter", "password", "secret", "private_key", "seed", "operators",
        "generated", "texts", "prompt", "prompts", "messages", "tokens", "content", "pieces", "payload",
    }
)  # fmt: skip
_KEY: Final = re.compile(r"-----BEGIN [^-]+-----.*?(-----END [^-]+-----|\Z)", re.DOTALL)
_TOKEN: Final = re.compile(r"corolla:[\w+/=-]+|\bhf_\w{8,}|(?i:\bbearer\s+)\S+|\bsk-[\w-]{8,}")
_LONG: Final = re.compile(r"[\w+/=-]{80,}")  # longer than ids of peers and fingerprints
_NAME: Final = re.compile(r"(/dns(?:4|6|addr)?/)([^/\s\"',]+)")
_HOME: Final = re.compile(r"(/home/|/Users/)([^/\s\"':,]+)")
_IPV4: Final = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\d)")
_TIME: Final = re.compile(r"\d{1,2}:\d\d:\d\d(\.\d+)?:?")
_IPV6: Final = re.compile(r"(?<![0-9a-fA-F:])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,8}(?:\.[0-9.]+)?")


class Redactor:
    """Masks one archive: the same address or name gets the same mask everywhere in it. names: to be masked too."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._masks: dict[str, str] = {}
        self._names = tuple(name for name in names if len(name) > 2)

    def value(self, value: Any) -> Any:
        """A plain value, all the way down. Fields that hold secrets stay, without their content."""
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): LEFT_OUT if key in SECRET_FIELDS and inner else self.value(inner)
                for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.value(inner) for inner in value]
        if isinstance(value, bytes):
            return LEFT_OUT
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        """A text without keys and tokens, and with masks for addresses, machines and users."""
        text = _KEY.sub("<key>", text)
        text = _TOKEN.sub("<token>", text)
        text = _NAME.sub(lambda found: found[1] + self._mask("name", found[2]), text)
        text = _HOME.sub(lambda found: found[1] + self._mask("user", found[2]), text)
        text = _IPV6.sub(lambda found: self._address(found[0]), text)
        text = _IPV4.sub(lambda found: self._address(found[0]), text)
        for name in self._names:
            text = re.sub(
                rf"(?<![\w<]){re.escape(name)}(?!\w)", lambda found: self._mask("name", found[0]), text
            )
        return _LONG.sub("<long>", text)

    def _address(self, text: str) -> str:
        """Those of this machine alone say nothing, and stay; of others only the kind does."""
        colon = ":" if text.endswith(":") and not text.endswith("::") else ""  # of the sentence
        if _TIME.fullmatch(text):
            return text
        try:
            address = ipaddress.ip_address(text.removesuffix(colon))
        except ValueError:
            return self._mask("unclear", text)  # an address with something behind it, perhaps
        if address.is_loopback or address.is_unspecified:
            return text
        kind = "public" if address.is_global else "private"
        return self._mask(f"ipv{address.version}-{kind}", str(address)) + colon

    def _mask(self, kind: str, text: str) -> str:
        if text.startswith("<"):
            return text  # masked already
        if text not in self._masks:
            num_alike = sum(mask.startswith(f"<{kind}-") for mask in self._masks.values())
            self._masks[text] = f"<{kind}-{num_alike + 1}>"
        return self._masks[text]


def write_bundle(path: Path, values: Mapping[str, Any], texts: Mapping[str, str], redactor: Redactor) -> None:
    """Pack values (as NAME.json) and texts (as NAME.txt), redacted; readable by this user alone.

    Raises `UNREADABLE` if the file cannot be written, `BAD_REQUEST` if there is one already.
    """
    plain = {name: redactor.value(complete(value)) for name, value in values.items()}
    files = {f"{name}.json": json.dumps(value, indent=2, default=str) for name, value in plain.items()}
    files |= {f"{name}.txt": redactor.text(text) for name, text in texts.items()}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, text in files.items():
                content = text.encode()
                entry = tarfile.TarInfo(f"corolla-doctor/{name}")
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))
    except FileExistsError as problem:
        raise error(
            Code.BAD_REQUEST, f"{path} is there already", "give another name, or remove it"
        ) from problem
    except OSError as problem:
        raise error(
            Code.UNREADABLE, f"cannot write {path}: {problem.strerror}", "name a file in a folder of yours"
        ) from problem
