"""A folder that holds Python, Corolla's daemon and SDK, and every library they need but the C library.

    python packaging/bundle.py WHEEL FOLDER

Copies the interpreter that runs this, installs WHEEL with its `daemon` extra into the copy, and takes along
the shared libraries that any of it links to, found from each file's own place (RPATH $ORIGIN). So the package
needs no Python and no compiler on the user's machine, only a C library as new as the one here. torch is not
in it: `daemonctl worker install` fetches the build that suits the machine's device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# Parts of the C library and of the compiler's run time on which everything on the machine depends anyway.
FROM_THE_SYSTEM = re.compile(
    r"(ld-linux.*|libc|libm|libdl|librt|libpthread|libutil|libresolv|libnsl|linux-vdso)\.so.*"
)
NOT_NEEDED = (
    *("test", "idlelib", "tkinter", "turtledemo", "lib2to3", "_tkinter*", "_test*"),
    *("site-packages", "__pycache__", "config-*"),
)
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGING = Path(__file__).parent
PROGRAM = """#!/bin/sh
# {name} of the Corolla package, in the interpreter that came with it
here=$(dirname "$(readlink -f "$0")")
exec "$here/{python}" -I -c 'import sys; from {module} import main; sys.argv[0] = "{name}"; main()' "$@"
"""


def main() -> None:
    wheel, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    python = copy_interpreter(folder)
    install(python, wheel)
    take_libraries(folder)
    write_programs(folder)
    run(python, "-m", "compileall", "-q", "-j0", str(folder / "lib" / VERSION))


def copy_interpreter(folder: Path) -> Path:
    """This interpreter and its standard library; it finds the latter beside itself, wherever it lies."""
    base = Path(sys.base_prefix)
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / VERSION
    shutil.copy2(base / "bin" / VERSION, python)
    library = folder / "lib" / VERSION
    shutil.copytree(
        sysconfig.get_path("stdlib"), library, symlinks=True, ignore=shutil.ignore_patterns(*NOT_NEEDED)
    )
    (library / "site-packages").mkdir()
    return python


def install(python: Path, wheel: Path) -> None:
    """The wheel and its dependencies, in the versions that the tests ran with; pip stays, for the worker's venv."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(Path(sys.base_prefix) / "lib"),
        "PYTHONNOUSERSITE": "1",
    }
    run(python, "-m", "ensurepip", "--default-pip", env=environment)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run(python, *pip, "-c", str(PACKAGING / "constraints.txt"), f"{wheel}[daemon]", env=environment)


def take_libraries(folder: Path) -> None:
    """Copy what any binary links to into `lib`, and have each look for it there."""
    target = folder / "lib"
    todo = [path for path in folder.rglob("*") if is_binary(path)]
    seen: set[str] = set()
    for path in todo:
        for name, source in linked(path).items():
            if name in seen or FROM_THE_SYSTEM.fullmatch(name) or folder in source.parents:
                continue
            seen.add(name)
            copy = target / name
            shutil.copy2(source.resolve(), copy)
            copy.chmod(0o755)
            todo.append(copy)
    for path in todo:
        own = f"$ORIGIN/{os.path.relpath(target, path.parent)}".removesuffix("/.")
        known = subprocess.run(
            ["patchelf", "--print-rpath", path], capture_output=True, text=True, check=True
        )
        beside = [part for part in known.stdout.strip().split(":") if part.startswith("$ORIGIN")]
        run("patchelf", "--set-rpath", ":".join(dict.fromkeys([*beside, own])), str(path))


def is_binary(path: Path) -> bool:
    """Whether it is an ELF file with a dynamic section."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def linked(path: Path) -> dict[str, Path]:
    """Name and place of the shared libraries of a binary, also those of its libraries."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(sys.base_prefix) / "lib")}
    listing = subprocess.run(["ldd", path], capture_output=True, text=True, env=environment).stdout
    return {name: Path(place) for name, place in re.findall(r"^\s*(\S+) => (/\S+)", listing, re.MULTILINE)}


def write_programs(folder: Path) -> None:
    """`corollad` and `daemonctl`, which look at nothing in the user's environment; pip's own name a build path."""
    for path in (folder / "bin").iterdir():
        if path.name != VERSION:
            path.unlink()
    for name, module in (("corollad", "corolla.daemon.__main__"), ("daemonctl", "corolla.sdk.cli")):
        program = folder / "bin" / name
        program.write_text(PROGRAM.format(name=name, module=module, python=VERSION))
        program.chmod(0o755)


def run(program: str | Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run it; a failure ends the build."""
    subprocess.run([program, *arguments], check=True, env=env)


if __name__ == "__main__":
    main()
