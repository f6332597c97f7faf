# Sourced by try and check: makes .venv with everything in it. Costs nothing when run again.
# Leaves $root (the checkout) and $venv set.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
stop() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Python with venv, a C compiler and GMP's headers: py-libp2p's `fastecdsa` is compiled on installation.
need_system() {
    local missing=()
    command -v "${PYTHON:-python3}" >/dev/null || missing+=(python3)
    "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    command -v gcc >/dev/null || missing+=(gcc)
    "${PYTHON:-python3}" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null || missing+=(python3-dev)
    printf '#include <gmp.h>\nint main(void){return 0;}' | gcc -E -x c - >/dev/null 2>&1 || missing+=(libgmp-dev)
    [ ${#missing[@]} -eq 0 ] && return
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        say "installing ${missing[*]} (system packages)"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
    else
        stop "this machine lacks: ${missing[*]}. Install them, on Debian and Ubuntu by
    sudo apt-get install ${missing[*]}
(elsewhere: Python 3.11 or later with venv and headers, gcc, and the GMP headers), then run this again."
    fi
}

# A machine without a GPU must not download the several GB of CUDA that plain torch brings along.
install_torch() {
    local pip=("$venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/packaging/constraints.txt")
    if ! command -v nvidia-smi >/dev/null &&
        "${pip[@]}" --dry-run --report - torch 2>/dev/null | grep -q '"name": "nvidia-'; then
        pip+=(--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple)
    fi
    "${pip[@]}" torch
}

make_venv() {
    local stamp=$venv/.corolla-setup
    local wanted
    wanted=$(cat "$root/pyproject.toml" "$root"/packaging/constraints.txt "${BASH_SOURCE[0]}" | sha256sum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    need_system
    [ -x "$venv/bin/python" ] || { say "making a virtual environment in .venv"; "${PYTHON:-python3}" -m venv "$venv"; }
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "$("$venv/bin/python" --version) is too old; set PYTHON to a Python 3.11 or later and remove .venv"
    say "installing PyTorch"
    install_torch
    say "installing Corolla and what it needs"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/packaging/constraints.txt" -e "$root[all,dev,examples]"
    printf '%s\n' "$wanted" >"$stamp"
}

# SmolLM2-135M-Instruct (Apache-2.0), 94 MB, into the user's cache. Sets $model.
fetch_model() {
    model=$("$venv/bin/python" "$root/packaging/fetch_model.py")
}

make_venv
