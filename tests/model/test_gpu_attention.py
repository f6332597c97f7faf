"""Attention by kernels that read pages in place, in Triton's interpreter: against pages that are gathered, and against
the same sums written out plainly. For devices that are not here the kernels are compiled only."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from corolla.model.alibi import Alibi
from corolla.model.device import Ways
from corolla.model.form import Bias, Form
from corolla.model.gathered import Gathering
from corolla.model.graphs import Repeater
from corolla.model.paged import RowTable, TableAttention, TokenTable

from .test_paged import STEPS, paged_span
from .test_span import TOLERANCE, Session, Tiny, tiny

tabled = pytest.importorskip("corolla.model.gpu.tabled")
trusted = pytest.importorskip("corolla.model.gpu.trusted")
OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources

__all__ = ["tiny"]  # the fixture

FEW, MANY = 1, 1000  # processors: each line is a program of its own, or of as many as are worth while
BREADTH = 1e-5


class Heads(NamedTuple):
    """Query heads, key heads, and the dimensions of keys and values."""

    num: int = 6
    num_kv: int = 2
    key_dim: int = 16
    value_dim: int = 16


def form(
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Bias | None = None,
) -> Form:
    return Form(0.3, window, softcap, sinks, bias)


SINKS = torch.linspace(-1, 2, 6)
FORMS: dict[str, tuple[Form, Heads]] = {
    "plain": (form(), Heads()),
    "a key head each": (form(), Heads(num_kv=6)),
    "one key head": (form(), Heads(num=20, num_kv=1)),
    "window": (form(window=9), Heads()),
    "softcap": (form(softcap=1.5), Heads()),
    "sinks": (form(sinks=SINKS), Heads()),
    "alibi": (form(bias=Alibi(6)), Heads()),
    "rounded alibi": (form(bias=Alibi(6, rounded=True, scale=0.25)), Heads()),
    "uneven": (form(), Heads(key_dim=80, value_dim=24)),
    "all": (form(9, 2.0, SINKS, Alibi(6, scale=0.5)), Heads(key_dim=8, value_dim=96)),
}


class Text(NamedTuple):
    """Rows in a paged cache in which all that nobody wrote is not a number. pages: of each row."""

    keys: Tensor
    values: Tensor
    pages: list[Tensor]
    spare_page: int
    page_tokens: int


def text(lengths: list[int], heads: Heads, page_tokens: int) -> Text:
    random = torch.Generator().manual_seed(len(lengths))
    sizes = [-(-length // page_tokens) for length in lengths]
    num_pages = sum(sizes) + 3
    keys = torch.full((num_pages * page_tokens, heads.num_kv, heads.key_dim), math.nan)
    values = torch.full((num_pages * page_tokens, heads.num_kv, heads.value_dim), math.nan)
    pages = list(torch.split(torch.randperm(num_pages - 1, generator=random)[: sum(sizes)], sizes))
    for own, length in zip(pages, lengths, strict=True):
        slots = (own[:, None] * page_tokens + torch.arange(page_tokens)).flatten()[:length]
        keys[slots] = torch.randn(length, *keys.shape[1:], generator=random)
        values[slots] = torch.randn(length, *values.shape[1:], generator=random)
    keys[-page_tokens] = values[-page_tokens] = 1  # what fills a batch up has been written too
    return Text(keys.transpose(0, 1), values.transpose(0, 1), pages, num_pages - 1, page_tokens)


def lines(of: Text, lengths: list[int], window: int | None, num_columns: int, num_fill: int) -> TokenTable:
    """A line for the last token of each row; the pages that a window has passed are let go of."""
    firsts = [0 if window is None else max(0, length - window) // of.page_tokens for length in lengths]
    table = torch.full((len(lengths) + num_fill, num_columns), of.spare_page)
    for line, (own, first) in enumerate(zip(of.pages, firsts, strict=True)):
        table[line, : len(own) - first] = own[first:]
    positions = [length - 1 for length in lengths] + [0] * num_fill
    return TokenTable(
        table,
        torch.tensor([first * of.page_tokens for first in firsts] + [0] * num_fill),
        torch.tensor(positions),
    )


def row_of(of: Text, start: int, n: int, first_page: int = 0) -> RowTable:
    """The tokens [start, start + n) of the first row."""
    first = first_page * of.page_tokens
    pages = of.pages[0][None, first_page : -(-(start + n) // of.page_tokens)]
    return RowTable(
        0, n, start, first, TokenTable(pages, torch.tensor([first]), torch.arange(start, start + n))
    )


def plainly(query: Tensor, of: Text, row: int, position: int, form: Form) -> Tensor:
    """(num_heads, value_dim) of one token's query (num_heads, key_dim): every score written out."""
    first = 0 if form.window is None else max(0, position - form.window + 1)
    places = torch.arange(first, position + 1)
    slots = of.pages[row][places // of.page_tokens] * of.page_tokens + places % of.page_tokens
    group = query.shape[0] // of.keys.shape[0]
    keys = of.keys[:, slots].repeat_interleave(group, 0)  # (num_heads, num_places, key_dim)
    scores = (keys @ query[:, :, None])[..., 0] * form.scaling
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if form.bias is not None:
        scores = scores + form.bias(places)
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks[:, None]], dim=1)
    weights = scores.softmax(1)[:, : len(places), None]
    return (weights * of.values[:, slots].repeat_interleave(group, 0)).sum(1)


def near(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, atol=BREADTH, rtol=BREADTH)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("num_processors", [FEW, MANY])
def test_few_new_tokens_of_many_rows_equal_the_plain_sums(name: str, num_processors: int) -> None:
    form, heads = FORMS[name]
    lengths = [141, 3, 40, 1]
    of = text(lengths, heads, page_tokens=4)
    table = lines(of, lengths, form.window, num_columns=64, num_fill=2)
    query = torch.randn(6, heads.num, heads.key_dim, generator=torch.Generator().manual_seed(1))
    kernels: TableAttention = tabled.BlockTables(num_processors)
    got = kernels.attend_lines(query, of.keys, of.values, table, form, 4)
    assert got.shape == (6, heads.num, heads.value_dim)
    for row, length in enumerate(lengths):
        assert near(got[row], plainly(query[row], of, row, length - 1, form))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("num_processors", [FEW, MANY])
def test_many_new_tokens_of_one_row_equal_the_plain_sums(name: str, num_processors: int) -> None:
    form, heads = FORMS[name]
    of = text([175], heads, page_tokens=4)
    query = torch.randn(175, heads.num, heads.key_dim, generator=torch.Generator().manual_seed(2))
    kernels: TableAttention = tabled.BlockTables(num_processors)
    for start, n in ((0, 9), (9, 50), (159, 16)):
        row = row_of(of, start, n, 0 if form.window is None else max(0, start - form.window + 1) // 4)
        got = kernels.attend_row(query[start : start + n], of.keys, of.values, row, form, 4)
        for position in {start, start + n // 2, start + n - 1}:
            assert near(got[position - start], plainly(query[position], of, 0, position, form))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_pages_as_large_as_the_product_has_them_equal_gathered_ones(name: str) -> None:
    form, heads = FORMS[name]
    lengths = [150, 64, 65]
    of = text(lengths, heads, page_tokens=64)
    table = lines(of, lengths, form.window, num_columns=4, num_fill=0)
    query = torch.randn(150, heads.num, heads.key_dim, generator=torch.Generator().manual_seed(3))
    row = row_of(of, 80, 70)
    ways: list[TableAttention] = [tabled.BlockTables(MANY), Gathering()]
    few = [way.attend_lines(query[:3], of.keys, of.values, table, form, 64) for way in ways]
    many = [way.attend_row(query[80:], of.keys, of.values, row, form, 64) for way in ways]
    assert near(*few)
    assert near(*many)


@pytest.mark.parametrize("heads", [Heads(), Heads(num_kv=3, key_dim=80, value_dim=24)], ids=str)
def test_new_tokens_are_written_where_their_slots_are_and_nowhere_else(heads: Heads) -> None:
    fused = torch.randn(5, heads.num_kv, heads.key_dim + heads.value_dim)
    key, value = (
        part.transpose(0, 1) for part in fused.split_with_sizes([heads.key_dim, heads.value_dim], 2)
    )
    slots = torch.tensor([9, 2, 3, 17, 0])
    written = []
    ways: list[TableAttention] = [tabled.BlockTables(FEW), Gathering()]
    for way in ways:
        of = text([70], heads, page_tokens=4)
        way.write(key, value, of.keys, of.values, slots)
        way.write(key.contiguous()[:, :1], value.contiguous()[:, :1], of.keys, of.values, torch.tensor([40]))
        written.append((of.keys, of.values))
    for got, expected in zip(*written, strict=True):
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_what_was_written_beyond_a_token_does_not_count() -> None:
    """A row that was rolled back, and a page that somebody else had before."""
    of = text([40], Heads(), page_tokens=4)
    table = TokenTable(of.pages[0][None], torch.tensor([0]), torch.tensor([29]))
    query = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(4))
    for number in (1e30, math.inf, math.nan):
        slots = (of.pages[0][7:, None] * 4 + torch.arange(4)).flatten()[2:]
        of.keys[:, slots] = number
        of.values[:, slots] = number
        got = tabled.BlockTables(MANY).attend_lines(query, of.keys, of.values, table, form(), 4)
        assert near(got[0], plainly(query[0], of, 0, 29, form()))


def attended_by(kernels: TableAttention, form: Form) -> float:
    """The greatest distance from the plain sums, of lines and of a row, twice."""
    of = text([30], Heads(), page_tokens=4)
    query = torch.randn(30, 6, 16, generator=torch.Generator().manual_seed(5))
    table = lines(of, [30], None, num_columns=16, num_fill=0)
    expected = plainly(query[-1], of, 0, 29, form)
    found = []
    for _ in range(2):
        found.append(kernels.attend_lines(query[-1:], of.keys, of.values, table, form, 4)[0])
        found.append(kernels.attend_row(query, of.keys, of.values, row_of(of, 0, 30), form, 4)[-1])
    return max(float((some - expected).abs().max()) for some in found)


@pytest.mark.parametrize(
    "form",
    [form(sinks=SINKS), form(window=9, softcap=2.0), form(bias=Alibi(6))],
    ids=["sinks", "window and softcap", "alibi"],
)
@pytest.mark.parametrize("num_processors", [FEW, MANY])
def test_kernels_that_are_right_are_trusted(form: Form, num_processors: int) -> None:
    kernels = trusted.Trusted(tabled.BlockTables(num_processors))
    assert attended_by(kernels, form) < BREADTH
    key, value = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for slots in (torch.arange(5), torch.arange(10, 15)):
        of = text([30], Heads(), page_tokens=4)
        kernels.write(key, value, of.keys, of.values, slots)
        assert torch.equal(of.keys[:, slots], key)
        assert torch.equal(of.values[:, slots], value)
    assert kernels.is_fit


def test_a_bias_of_an_unknown_kind_is_attended_by_gathering() -> None:
    biased = form(bias=lambda positions: -(positions.float() ** 2).expand(6, *positions.shape) / 100)
    kernels = trusted.Trusted(tabled.BlockTables(FEW))
    assert attended_by(kernels, biased) < BREADTH
    assert kernels.is_fit


class Unfit:
    """A kernel that takes more of a device than it has."""

    num_launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            self.num_launches += 1
            raise OutOfResources(101376, 65536, "shared memory")

        return launch


def test_where_a_kernel_does_not_fit_pages_are_gathered_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unfit = Unfit()
    monkeypatch.setattr(tabled, "attend_tiles", unfit)
    with caplog.at_level(logging.WARNING):
        assert attended_by(trusted.Trusted(tabled.BlockTables(FEW)), form()) < BREADTH
    assert unfit.num_launches == 1
    (record,) = caplog.records
    assert "shared memory" in record.message


@pytest.mark.parametrize("name", ["attend_tiles", "keep_tokens"])
def test_where_a_kernel_is_wrong_torch_serves_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    class Wrong:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **constants: arguments[3].zero_()

    monkeypatch.setattr(tabled, name, Wrong())
    kernels = trusted.Trusted(tabled.BlockTables(FEW))
    with caplog.at_level(logging.WARNING):
        key, value = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        for _ in range(2):
            of = text([30], Heads(), page_tokens=4)
            kernels.write(key, value, of.keys, of.values, torch.arange(5))
            assert torch.equal(of.values[:, :5], value)
        assert attended_by(kernels, form()) < BREADTH
    assert not kernels.is_fit
    (record,) = caplog.records
    assert "off by" in record.message


def test_a_device_is_kept_busy_by_shares_and_no_share_is_too_small() -> None:
    assert tabled.num_shares(8, 1 << 16, num_processors=132) == 32
    assert tabled.num_shares(8 * 32, 1 << 16, num_processors=132) == 1
    assert tabled.num_shares(8, 300, num_processors=132) == 2
    assert tabled.num_shares(1, 1 << 20, num_processors=132) == 64
    assert tabled.num_shares(1000, 1, num_processors=1) == 1


# More than a few take long in the interpreter.
FAMILIES = ("llama", "gemma2", "gpt_oss")
MORE = ("bloom", "falcon_multi_query", "falcon_alibi", "phi3", "olmo3")


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
)
def test_attended_by_kernels_and_played_again_equals_whole(tiny: Callable[[str], Tiny], family: str) -> None:
    model = tiny(family)
    kernels = trusted.Trusted(tabled.BlockTables(MANY))
    session = Session(model, [paged_span(model, Ways(kernels, recorder=Repeater()))])
    for rows in (*STEPS[:4], *STEPS[7:]):  # a program at a time takes long
        assert session.step(*rows) < TOLERANCE
    assert kernels.is_fit


COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from corolla.model.form import Form
from corolla.model.gpu import tabled
from corolla.model.paged import RowTable, TokenTable

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
found = {}

class Absent:
    "A device that kernels are compiled for."
    def __init__(self, capability):
        self.capability = capability
    def get_current_device(self):
        return self.capability
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

class Compiled:
    "A kernel that is compiled instead of launched."
    def __init__(self, name):
        self.name, self.kernel = name, getattr(tabled, name)
    def __getitem__(self, grid):
        def compile(*arguments, **options):
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            kind = self.name, made.metadata.target.arch, model, options.get("TOKENS"), options.get("IS_SHARED")
            found.setdefault(str(kind), {})[made.hash] = made
        return compile

def resources(made):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        dump = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    (line,) = [line for line in dump.stdout.splitlines() if "REG:" in line]
    numbers = dict(part.split(":") for part in line.split())
    return {"stack": int(numbers["STACK"]), "local": int(numbers["LOCAL"]), "shared": made.metadata.shared}

for name in ("attend_tiles", "join_shares", "keep_tokens"):
    setattr(tabled, name, Compiled(name))
kernels = tabled.BlockTables(num_processors=132)
numbers = torch.zeros(640, dtype=torch.int64)
for capability in (80, 90):
    driver.set_active(Absent(capability))
    for model, num_heads, num_kv_heads, dim, form in (
        ("llama", 64, 8, 128, Form(0.1, None, None, None, None)),
        ("gemma2", 16, 8, 256, Form(0.1, 4096, 50.0, None, None)),
    ):
        slots = torch.empty((64, num_kv_heads, dim), dtype=torch.bfloat16).transpose(0, 1)
        query = torch.empty((999, num_heads, dim), dtype=torch.bfloat16)
        for num_lines, at in ((1, 0), (3, 1), (40, 0)):
            own = numbers[at:]
            table = TokenTable(own[: num_lines * 16].view(-1, 16), own[:num_lines], own[:num_lines])
            kernels.attend_lines(query[:num_lines], slots, slots, table, form, 64)
            kernels.write(slots[:, :num_lines], slots[:, :num_lines], slots, slots, own)
        for n, start in ((16, 0), (99, 7), (999, 0)):
            table = TokenTable(numbers[None, start:], numbers[:1], numbers[start:])
            kernels.attend_row(query[:n], slots, slots, RowTable(0, n, start, 0, table), form, 64)
print(json.dumps({kind: [resources(made) for made in variants.values()] for kind, variants in found.items()}))
"""


def test_kernels_compile_for_real_devices_once_for_all_sizes_and_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == 2 * 2 * (2 * 2 + 2)  # each of the four kinds of tiles, and the two other kernels
    for kind, variants in answers.items():
        (found,) = variants
        assert found["stack"] == 0, kind
        assert found["local"] == 0, kind
        assert found["shared"] < 99 * 1024, kind  # what a program may have where the least is allowed
