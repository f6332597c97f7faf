"""A newer package is installed while the machine serves a text of another one: nobody notices but its owner.

Three daemons in one container: the service, a second machine that serves the same blocks, and the one whose user
generates. Workers run in this interpreter's torch, seen through a mount; all else is of the package.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from transformers import LlamaForCausalLM  # noqa: E402

import corolla  # noqa: E402

from ..model.tiny import NUM_BLOCKS, save_tiny  # noqa: E402
from .container import Container, booted, copy_root, why_not  # noqa: E402
from .test_service import shown, status_of  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

OLD, NEW = corolla.__version__, "99.1.0"
LIBRARY = "usr/lib/corolla/lib/python3.11/site-packages"
OTHERS = "/srv/others"  # programs of machines that are not updated
SETTINGS = (
    'device = ["cpu"]\ndtype = "float32"\nthreads = 1\nmdns = false\nupnp = false\nlow_priority = false\n'
)
PROMPT = [5, 17, 40, 8, 23]
MOST_TOKENS = 16_000  # to write them takes any machine longer than to unpack the package
USER = f"""
import json, pathlib, corolla
tokens, happened, enough = [], [], pathlib.Path("/srv/enough")
with corolla.connect("/srv/user/s") as daemon, daemon.model("tiny").generate(
    tokens=[{PROMPT}], max_new_tokens={MOST_TOKENS}, stream=True, events=True
) as pieces:
    for piece in pieces:
        if piece.event is not None:
            happened.append(piece.event)
            continue
        tokens.append(piece.token)
        if enough.exists():
            break
pathlib.Path("/srv/text").write_text(json.dumps([tokens, happened]))
"""


def patched(deb: Path, folder: Path) -> Path:
    """The package of a later version, whose state has another form."""
    subprocess.run(["dpkg-deb", "-R", deb, folder / "tree"], check=True)
    package = folder / "tree" / LIBRARY / "corolla"
    for path, old, new in (
        (package / "__init__.py", f'__version__ = "{OLD}"', f'__version__ = "{NEW}"'),
        (package / "daemon/store.py", "STATE_VERSION: Final = 1", "STATE_VERSION: Final = 2"),
        (
            package / "daemon/store.py",
            "Migration]] = {}",
            'Migration]] = {1: lambda state: {**state, "swarm": state["swarm"]}}',
        ),
        (folder / "tree/DEBIAN/control", f"Version: {OLD}", f"Version: {NEW}"),
    ):
        text = path.read_text()
        assert text.count(old) == 1, (path, old)
        path.write_text(text.replace(old, new))
    later = folder / "later.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", folder / "tree", later], check=True, capture_output=True)
    shutil.rmtree(folder / "tree")
    return later


def lay_environment(root: Path, state: Path, programs: str) -> None:
    """What `daemonctl worker install` makes, but with the torch that is seen in /srv/torch."""
    folder = state / "worker" / OLD
    library = folder / "lib/python3.11/site-packages"
    (root / library).mkdir(parents=True)
    (root / folder / "bin").mkdir()
    (root / folder / "bin/python").symlink_to(f"{programs}/bin/python3.11")
    (root / folder / "pyvenv.cfg").write_text(f"home = {programs}/bin\n")
    ours = f"{programs}/lib/python3.11/site-packages"
    (root / library / "corolla-daemon.pth").write_text(
        f"import site; site.addsitedir({ours!r})\n/srv/torch\n"
    )
    (root / folder / "corolla-installed").touch()
    (root / folder.parent / NEW).symlink_to(OLD)


@pytest.fixture
def debian(tmp_path: Path, fresh_root: Path, deb: Path) -> Iterator[Container]:
    """One with the package, torch, and a small model."""
    root = tmp_path / "root"
    copy_root(fresh_root, root)
    later = patched(deb, tmp_path)
    later.rename(root / "later.deb")
    shutil.copy(deb, root / "corolla.deb")
    save_tiny(root / "srv/tiny", "llama", seed=4, eos_token_id=None, max_position_embeddings=2 * MOST_TOKENS)
    subprocess.run(["chmod", "-R", "a+rX", root / "srv"], check=True)
    (root / "srv/torch").mkdir()
    (root / "srv/user.py").write_text(USER)
    seen = {Path(sysconfig.get_path("purelib")): "/srv/torch"}
    with booted(root, seen) as container:
        yield container
    shutil.rmtree(root)


def wait_for(debian: Container, socket: str, pattern: str, what: str, deadline_s: float = 300.0) -> None:
    """Wait until `daemonctl status` or `swarm` of a daemon shows something."""
    command = f"daemonctl status --socket {socket}; daemonctl swarm --socket {socket}"
    said, deadline = "", time.monotonic() + deadline_s
    while not re.search(pattern, said):
        if time.monotonic() > deadline:
            log = debian.run("journalctl", "--no-pager", "-n", "60")
            raise AssertionError(f"not within {deadline_s:g} s: {what}\n{said}\n{log}")
        said = debian.run("sh", "-c", command, check=False)


def start_other(debian: Container, name: str, *arguments: str) -> None:
    """A machine beside the service."""
    state = Path("srv") / name / "state"
    lay_environment(debian.folder, state, OTHERS)
    places = ("--state-dir", f"/{state}", "--socket", f"/srv/{name}/s", "--cache-dir", f"/srv/{name}/cache")
    usual = ("--listen", "/ip4/127.0.0.1/tcp/0", "--device", "cpu", "--dtype", "float32", "--threads", "1")
    program = [f"{OTHERS}/bin/corollad", *places, *usual, "--no-mdns", "--no-upnp", *arguments]
    debian.run("systemd-run", f"--unit={name}", "--setenv=COROLLA_LOW_PRIORITY=false", *program)


def chosen(model: Path, tokens: list[int]) -> list[int]:
    """What the whole model would write at each place of this text."""
    whole = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = whole(torch.tensor([[*PROMPT, *tokens[:-1]]]), use_cache=False).logits
    return [int(token) for token in logits[0, len(PROMPT) - 1 :].argmax(-1)]


def test_an_update_amid_a_text_changes_no_token_and_a_step_back_is_refused(debian: Container) -> None:
    lay_environment(debian.folder, Path("var/lib/corolla"), "/usr/lib/corolla")
    debian.run("dpkg", "-i", "/corolla.deb")
    debian.run("cp", "-a", "/usr/lib/corolla", OTHERS)
    with (debian.folder / "etc/corolla/config.toml").open("a") as file:
        file.write(
            f'{SETTINGS}model = "/srv/tiny"\nblocks = "0:{NUM_BLOCKS}"\nlisten = ["/ip4/127.0.0.1/tcp/4517"]\n'
        )
    debian.run("systemctl", "restart", "corollad")
    debian.run("daemonctl", "swarm", "create", "bees")
    wait_for(debian, "/run/corolla/control.sock", "tiny blocks 0:4, online", "the service serves")
    before = status_of(debian)
    join = ("--join", before["join_command"].split()[-1], "--model", "/srv/tiny", "--blocks")
    start_other(debian, "user", *join, "none")
    wait_for(debian, "/srv/user/s", r"replicas 0:4 ×1", "the user knows the service")
    start_other(debian, "second", *join, f"0:{NUM_BLOCKS}")
    wait_for(debian, "/srv/user/s", r"replicas 0:4 ×2", "the user knows both")
    debian.run("daemonctl", "drain", "--socket", "/srv/second/s")
    debian.run("systemd-run", "--unit=text", f"{OTHERS}/bin/python3.11", "-I", "/srv/user.py")
    wait_for(debian, "/run/corolla/control.sock", r"[1-9]\d* sessions", "the service has the user's session")
    debian.run("daemonctl", "resume", "--socket", "/srv/second/s")
    wait_for(debian, "/srv/user/s", r"replicas 0:4 ×2", "the user knows both again")
    wait_for(debian, "/run/corolla/control.sock", r"[1-9]\d* sessions", "the session is still there")

    debian.run("dpkg", "-i", "/later.deb")

    status = status_of(debian)
    assert (status["version"], status["peer"], status["swarm"]) == (NEW, before["peer"], "bees")
    wait_for(debian, "/run/corolla/control.sock", "tiny blocks 0:4, online", "the new version serves")
    log = debian.run("journalctl", "-u", "corollad", "--no-pager")
    assert "Failed with result" not in log
    (debian.folder / "srv/enough").touch()
    debian.run("sh", "-c", "while systemctl is-active -q text; do sleep 0.2; done")
    ended = debian.run("systemctl", "show", "text", "--property=Result")
    assert ended.strip() == "Result=success", debian.run("journalctl", "-u", "text", "--no-pager")
    tokens, happened = json.loads((debian.folder / "srv/text").read_text())
    print(f"{len(tokens)} tokens, events {happened}")
    assert "repaired" in happened
    assert tokens == chosen(debian.folder / "srv/tiny", tokens)

    debian.run("daemonctl", "config", "set", "idle_minutes", "0.0")
    state = debian.folder / "var/lib/corolla/state.json"
    assert json.loads(state.read_text())["version"] == 2
    kept = state.read_bytes()
    debian.run("dpkg", "-i", "/corolla.deb")
    assert shown(debian, "ActiveState", "NRestarts", "ExecMainStatus") == ["failed", "0", "4"]
    assert "written by a later Corolla" in debian.run("journalctl", "-u", "corollad", "--no-pager")
    assert state.read_bytes() == kept
    debian.run("dpkg", "-i", "/later.deb")
    assert status_of(debian)["swarm"] == "bees"
