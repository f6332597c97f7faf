"""The Jargon File: 1.3 million characters of English in the public domain, as hackers' slang explains itself.

Found where Debian's package `dict-jargon` puts it, or taken out of that package, which `apt-get download`
fetches without root.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import platformdirs

INSTALLED: Final = Path("/usr/share/dictd/jargon.dict.dz")
# A word at the margin, a line that says what it is (" /foo/ , n."), then the definition, indented.
_ENTRY: Final = re.compile(
    r"^(?P<word>\S.*)\n [^\n]*?\b(?P<part>n|v|vt|vi|adj|adv|interj)\.[^\n]*\n(?P<text>(?:\n|    .*\n)+)",
    re.MULTILINE,
)


class Entry(NamedTuple):
    """One word. part_of_speech: as the file abbreviates it, such as `n` or `adj`."""

    word: str
    part_of_speech: str
    definition: str


def text(file: Path | None = None) -> str:
    """The whole text; of another file if one is given, plain or compressed. Ends the program if there is none."""
    path = file or (INSTALLED if INSTALLED.exists() else _fetch())
    if not path.exists():
        sys.exit(f"error: {path} does not exist; give a text with --text FILE")
    if path.suffix in (".dz", ".gz"):
        return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    return path.read_text(errors="replace")


def entries(whole: str) -> Iterator[Entry]:
    """The words of the file that are defined with their part of speech."""
    for found in _ENTRY.finditer(whole):
        definition = " ".join(found["text"].split())
        if len(definition) > 60:  # the others only point elsewhere
            yield Entry(found["word"].strip(), found["part"], definition)


def _fetch() -> Path:
    """The file out of Debian's package, kept in the user's cache."""
    target = Path(platformdirs.user_cache_dir("corolla")) / "texts" / INSTALLED.name
    if target.exists():
        return target
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        sys.exit(
            "error: the Jargon File comes from Debian's package dict-jargon; give a text with --text FILE"
        )
    print("fetching the Jargon File (Debian's dict-jargon, 0.6 MB)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        fetched = subprocess.run(
            ["apt-get", "download", "-qq", "dict-jargon"], cwd=scratch, capture_output=True, check=False
        )
        packages = list(Path(scratch).glob("*.deb"))
        if fetched.returncode or not packages:
            sys.exit("error: apt-get could not fetch dict-jargon; give a text with --text FILE")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), scratch], check=True)
        shutil.copy(Path(scratch) / INSTALLED.relative_to("/"), target)
    return target
