"""Gradients through real daemons against transformers in one process, also when hops die."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import corolla
from corolla.model.dropout import kept
from corolla.protocol.errors import Code, CorollaError
from corolla.sdk.checkpoints import Checkpoints
from corolla.sdk.client import Daemon, Model
from corolla.sdk.dropout import DropoutCount
from corolla.sdk.parts import Weights, part_file
from corolla.sdk.torch import DistributedModelForCausalLM
from corolla.sdk.training import Trip

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm
from .fleet import peer_of

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
TOLERANCE = 1e-4
WIRING_TOLERANCE = 1e-6  # between two ways through the same swarm

# PEFT asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Setting(NamedTuple):
    swarm: LocalSwarm
    client: DaemonProcess
    hops: list[DaemonProcess]
    whole: Any
    folder: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    whole = save_tiny(folder, "llama", seed=4, eos_token_id=None)
    cache = tmp_path_factory.mktemp("cache")
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(cache)) as swarm:
        client = swarm.found()
        hops = [swarm.serve("front", 0, 2), swarm.serve("back", 2, NUM_BLOCKS)]
        hops.append(swarm.serve("spare", 2, NUM_BLOCKS))
        for daemon in hops:
            daemon.wait_online()
        swarm.wait_covered(client, [1] * 2 + [2] * (NUM_BLOCKS - 2))
        yield Setting(swarm, client, hops, whole, folder)


@pytest.fixture
def daemon(setting: Setting) -> Iterator[Daemon]:
    with corolla.connect(setting.client.socket) as daemon:
        yield daemon


@pytest.fixture
def model(daemon: Daemon) -> Model:
    return daemon.model("tiny")


def local(whole: Any, hidden: Tensor, start: int, end: int) -> Tensor:
    """Blocks [start, end) in this process."""
    decoder = whole.model
    positions = torch.arange(hidden.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    n = hidden.shape[1]
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
    for layer in decoder.layers[start:end]:
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check(model: Model, whole: Any, blocks: tuple[int, int], between: Any = None) -> None:
    hidden = states(3, 7, 64, seed=1).requires_grad_()
    gradient = states(3, 7, 64, seed=2)
    expected = local(whole, hidden, *blocks)
    expected.backward(gradient)  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    with model.passing(hidden.detach(), Trip(blocks)) as passed:
        assert distance(passed.output, expected.detach()) < TOLERANCE
        if between is not None:
            between()
        assert distance(model.backward(passed, gradient).inputs, hidden.grad) < TOLERANCE


@pytest.mark.parametrize("blocks", [(0, NUM_BLOCKS), (1, 3), (2, 3)])
def test_gradients_equal_those_of_one_process(
    model: Model, setting: Setting, blocks: tuple[int, int]
) -> None:
    check(model, setting.whole, blocks)


def test_a_forward_keeps_nothing(model: Model, setting: Setting) -> None:
    hidden = states(2, 5, 64)
    found = model.forward(hidden.numpy(), blocks=(0, 2))
    with torch.no_grad():
        assert distance(torch.from_numpy(found), local(setting.whole, hidden, 0, 2)) < TOLERANCE


def test_a_pass_goes_back_once(model: Model) -> None:
    hidden = states(1, 3, 64)
    passed = model.passing(hidden)
    passed.backward(hidden)
    with pytest.raises(CorollaError, match="no pass") as caught:
        passed.backward(hidden)
    assert caught.value.code is Code.UNKNOWN_SESSION


@pytest.mark.parametrize(
    ("hidden", "blocks", "code"),
    [
        (torch.full((1, 2, 64), float("nan")), None, Code.NOT_FINITE),
        (torch.zeros(1, 2, 63), None, Code.BAD_SHAPE),
        (torch.zeros(2, 64), None, Code.BAD_SHAPE),
        (torch.zeros(1, 2, 64), (0, 99), Code.BLOCKS_OUT_OF_RANGE),
    ],
)
def test_what_cannot_be_computed_is_refused(
    model: Model, hidden: Tensor, blocks: tuple[int, int] | None, code: Code
) -> None:
    with pytest.raises(CorollaError) as caught:
        model.forward(hidden, blocks=blocks)
    assert caught.value.code is code


def test_gradients_of_a_wrong_shape_are_refused(model: Model) -> None:
    with model.passing(states(1, 3, 64)) as passed, pytest.raises(CorollaError) as caught:
        passed.backward(states(1, 4, 64))
    assert caught.value.code is Code.BAD_SHAPE


IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(3))
RIGHT = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])


def distributed(setting: Setting, daemon: Daemon) -> Any:
    return DistributedModelForCausalLM.from_pretrained(
        daemon.models()[0].name, ends=setting.folder, daemon=daemon, dtype=torch.float32
    )


def peft_of(
    setting: Setting,
    folder: Path,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    dropout: float = 0.0,
) -> Any:
    """PEFT in this process, with factors that are all random; its adapter lies in `folder`."""
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=dropout, target_modules=list(targets), bias="none")
    adapted = get_peft_model(deepcopy(setting.whole), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(str(folder))
    return adapted


def gradients_of(adapted: Any) -> dict[str, Tensor]:
    """Those of PEFT's factors, by the names that they have in its file."""
    return {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name and parameter.grad is not None
    }


@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1)], ids=["full", "right", "left"])
def test_loss_backward_gives_pefts_gradients(
    setting: Setting, daemon: Daemon, tmp_path: Path, mask: Tensor | None
) -> None:
    adapted = peft_of(setting, tmp_path)
    model = distributed(setting, daemon)
    model.load_adapter(tmp_path)
    labels = IDS
    if mask is not None:  # a row's first token is not to be told from the padding before it
        labels = IDS.masked_fill((mask == 0) | (mask.roll(1, dims=1) == 0), -100)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    ours = model(IDS, attention_mask=mask, labels=labels, position_ids=positions)
    theirs = adapted(input_ids=IDS, attention_mask=mask, labels=labels, position_ids=positions)
    assert abs(ours.loss.item() - theirs.loss.item()) < 1e-4
    ours.loss.backward()
    theirs.loss.backward()
    expected = gradients_of(adapted)
    assert len(expected) == len(model.adapter_parameters()) == NUM_BLOCKS * 6
    found = model.blocks.adapter.named_factors()
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert distance(found[name].grad, reference) < TOLERANCE, name


@pytest.mark.parametrize("cut", [1, 2])
def test_layers_of_ones_own_between_the_blocks_and_behind_them_learn_as_in_one_process(
    setting: Setting, daemon: Daemon, tmp_path: Path, cut: int
) -> None:
    adapted = peft_of(setting, tmp_path)
    model = distributed(setting, daemon)
    model.load_adapter(tmp_path)
    torch.manual_seed(8)
    ours = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)])
    theirs = deepcopy(ours)
    embeds, ends = setting.whole.get_input_embeddings()(IDS).detach(), RIGHT.sum(1) - 1

    def loss(first: Any, second: Any, layers: Any) -> Tensor:
        middle = first(embeds)
        last = second(middle + layers[0](middle).tanh())[torch.arange(3), ends]
        entropy = torch.nn.functional.cross_entropy(layers[1](last), torch.arange(3))
        whole: Tensor = entropy + middle[RIGHT.bool()].square().mean()
        return whole

    def remote(blocks: slice) -> Any:
        return lambda hidden: model.blocks[blocks](hidden, padding=RIGHT)

    def here(start: int, end: int) -> Any:
        return lambda hidden: local(adapted.base_model.model, hidden, start, end)

    found = loss(remote(slice(0, cut)), remote(slice(cut, NUM_BLOCKS)), ours)
    expected = loss(here(0, cut), here(cut, NUM_BLOCKS), theirs)
    assert abs(found.item() - expected.item()) < 1e-4
    for one in (found, expected):
        one.backward()  # type: ignore[no-untyped-call]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert distance(mine.grad, other.grad) < TOLERANCE
    factors = model.blocks.adapter.named_factors()
    for name, reference in gradients_of(adapted).items():
        assert distance(factors[name].grad, reference) < TOLERANCE, name


@pytest.mark.parametrize("save", ["save_adapter", "save_pretrained"])
def test_an_adapter_that_learned_here_works_in_peft(
    setting: Setting, daemon: Daemon, tmp_path: Path, save: str
) -> None:
    peft_of(setting, tmp_path / "start")
    model = distributed(setting, daemon)
    model.load_adapter(tmp_path / "start")
    optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    getattr(model, save)(tmp_path / "learned")
    (job,) = daemon.status().training
    assert (job.model, job.num_tokens >= 3 * IDS.numel()) == ("tiny", True)
    assert {peer_of(hop) for hop in setting.hops} >= set(job.peers) > {peer_of(setting.hops[0])}
    assert job.micro_batches_per_s > 0
    elsewhere = PeftModel.from_pretrained(deepcopy(setting.whole), tmp_path / "learned")
    with torch.no_grad():
        ours, theirs = model(IDS, use_cache=False).logits, elsewhere(IDS).logits
    assert distance(ours, theirs) < TOLERANCE


def test_without_an_adapter_there_is_nothing_to_save(
    setting: Setting, daemon: Daemon, tmp_path: Path
) -> None:
    with pytest.raises(CorollaError, match="no adapter") as caught:
        distributed(setting, daemon).save_pretrained(tmp_path / "nothing")
    assert caught.value.code is Code.BAD_REQUEST
    assert not (tmp_path / "nothing").exists()


def test_packed_sequences_do_not_see_each_other(setting: Setting, daemon: Daemon) -> None:
    model = distributed(setting, daemon)
    packed = states(1, 8, 64).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    gradient = states(1, 8, 64, seed=9)
    model.blocks[1:4](packed, position_ids=positions).backward(gradient)
    alone = packed.detach().clone().requires_grad_()
    apart = [local(setting.whole, piece, 1, 4) for piece in (alone[:, :3], alone[:, 3:])]
    torch.cat(apart, 1).backward(gradient)  # type: ignore[no-untyped-call]
    assert packed.grad is not None
    assert alone.grad is not None
    assert distance(packed.grad, alone.grad) < TOLERANCE


@pytest.mark.parametrize("options", [{"target_modules": ["nothing"]}, {"r": 0}, {"lora_dropout": 1.0}])
def test_a_lora_that_cannot_be_is_refused(setting: Setting, daemon: Daemon, options: dict[str, Any]) -> None:
    config = SimpleNamespace(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **options})
    with pytest.raises(CorollaError, match=next(iter(options))):
        distributed(setting, daemon).add_adapter(config)


def test_gradients_that_are_not_finite_are_refused_and_the_pass_is_kept(model: Model) -> None:
    hidden = states(1, 3, 64)
    with model.passing(hidden) as passed:
        with pytest.raises(CorollaError, match="192 of 192 hidden values are NaN") as caught:
            passed.backward(hidden * float("nan"))
        assert caught.value.code is Code.NOT_FINITE
        assert passed.backward(hidden).inputs.isfinite().all()


def test_a_loss_that_is_not_finite_stops_before_anything_is_changed(
    setting: Setting, daemon: Daemon, tmp_path: Path
) -> None:
    peft_of(setting, tmp_path)
    model = distributed(setting, daemon)
    model.load_adapter(tmp_path)
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(CorollaError, match="NaN or infinite"):
        (loss * float("nan")).backward()
    assert all(parameter.grad is None for parameter in model.adapter_parameters())
    loss = model(IDS, labels=IDS).loss  # and the run goes on
    loss.backward()
    with torch.no_grad():
        model.adapter_parameters()[0].fill_(float("inf"))
    with pytest.raises(
        CorollaError, match=r"layers.0.self_attn.q_proj.lora_A.weight of the adapter"
    ) as caught:
        model(IDS)
    assert caught.value.code is Code.NOT_FINITE


def test_a_micro_batch_beyond_all_limits_is_refused_with_its_size(model: Model) -> None:
    with pytest.raises(CorollaError, match="a micro-batch of 262400 tokens is 67174400 bytes") as caught:
        model.forward(torch.zeros(256, 1025, 64))
    assert caught.value.code is Code.LIMIT_EXCEEDED


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (
            {"self_attn.z_proj.lora_A": (2, 64), "self_attn.z_proj.lora_B": (64, 2)},
            "no linear layer 'self_attn.z_proj'",
        ),
        (
            {"self_attn.q_proj.lora_A": (2, 65), "self_attn.q_proj.lora_B": (64, 2)},
            r"\(2, 65\), block 1 wants 64",
        ),
        ({"prompt": (4, 32)}, r"\(4, 32\), block 1 wants 64"),
    ],
    ids=["target", "shape", "prompt"],
)
def test_a_part_that_fits_no_block_is_refused_with_its_values(
    model: Model, tensors: dict[str, tuple[int, int]], named: str
) -> None:
    made = part_file(
        {name: Weights(shape, bytes(4 * shape[0] * shape[1])) for name, shape in tensors.items()}, {}
    )
    model.put_part(made.name, made.data)
    trip = Trip((0, NUM_BLOCKS), parts=(b"", made.name, *[b""] * (NUM_BLOCKS - 2)))
    with pytest.raises(CorollaError, match=named) as caught:
        model.passing(states(1, 3, 64), trip)
    assert caught.value.code is Code.BAD_SHAPE


def test_a_part_that_nobody_put_is_told_by_its_name(model: Model) -> None:
    trip = Trip((0, 1), parts=(bytes(32),))
    with pytest.raises(CorollaError, match="keeps 0 of the adapter's 1 parts") as caught:
        model.passing(states(1, 3, 64), trip)
    assert (caught.value.code, caught.value.details["missing"]) == (Code.ADAPTER_MISSING, [bytes(32).hex()])


def test_a_daemon_that_dropped_the_parts_gets_them_again(
    setting: Setting, daemon: Daemon, tmp_path: Path
) -> None:
    peft_of(setting, tmp_path)
    model = distributed(setting, daemon)
    model.load_adapter(tmp_path)
    first = model(IDS, labels=IDS).loss
    daemon.remove_adapter("tiny")
    second = model(IDS, labels=IDS).loss
    assert second.item() == pytest.approx(first.item())
    daemon.remove_adapter("tiny")
    second.backward()  # what a pass needs is kept with it
    assert all(parameter.grad.isfinite().all() for parameter in model.adapter_parameters())


def test_a_part_with_a_wrong_hash_is_refused_with_both(model: Model) -> None:
    with pytest.raises(CorollaError, match="4 bytes named 000000000000 have the sha256 3a6eb0790f39"):
        model.put_part(bytes(32), b"data")


class Masked(torch.nn.Module):
    """PEFT's dropout with our masks: of one layer, for rows of whole sequences from position 0."""

    def __init__(self, dropout: DropoutCount, block: int, target: str, p: float) -> None:
        super().__init__()
        self.dropout, self.block, self.target, self.p = dropout, block, target, p

    def forward(self, x: Tensor) -> Tensor:
        rows, n, features = x.shape
        samples = torch.arange(rows).repeat_interleave(n)
        positions = torch.arange(n).repeat(rows)
        run = (self.dropout.seed, self.dropout.step)
        mask = kept(run, self.block, self.target, samples, positions, (features, self.p))
        return x * mask.view(x.shape) / (1 - self.p)


def test_dropout_drops_what_its_numbers_say(setting: Setting, daemon: Daemon, tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, lora_dropout=0.4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    adapted: Any = get_peft_model(deepcopy(setting.whole), config)
    adapted.save_pretrained(str(tmp_path))
    model = distributed(setting, daemon)
    model.load_adapter(tmp_path, dropout_seed=11)
    told = DropoutCount(11)
    for block, layer in enumerate(adapted.base_model.model.model.layers):
        for target in ("self_attn.q_proj", "mlp.down_proj"):
            masked = Masked(told, block, target, 0.4)
            layer.get_submodule(target).lora_dropout["default"] = masked
    optimizers = [torch.optim.SGD(model.adapter_parameters(), lr=0.1)]
    optimizers.append(torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1))
    model.train()
    losses = []
    for step in range(2):
        told.step = step
        for optimizer in optimizers:
            optimizer.zero_grad()
        ours, theirs = model(IDS, labels=IDS).loss, adapted(input_ids=IDS, labels=IDS).loss
        losses.append((ours.item(), theirs.item()))
        ours.backward()
        theirs.backward()
        found, expected = model.blocks.adapter.named_factors(), gradients_of(adapted)
        for name, reference in expected.items():
            assert distance(found[name].grad, reference) < TOLERANCE, (step, name)
        for optimizer in optimizers:
            optimizer.step()
    assert all(abs(one - other) < 1e-4 for one, other in losses)
    model.eval()
    with torch.no_grad():
        undropped = model(IDS, labels=IDS, use_cache=False).loss.item()
    assert abs(undropped - losses[1][0]) > 1e-3  # or nothing was ever dropped


def test_a_restored_run_with_dropout_ends_as_one_that_was_never_interrupted(
    setting: Setting, daemon: Daemon, tmp_path: Path
) -> None:
    def made() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(6)
        model = distributed(setting, daemon)
        config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
        model.add_adapter(config, dropout_seed=3)
        model.train()
        return model, torch.optim.AdamW(model.adapter_parameters(), lr=0.02)

    def steps(model: Any, optimizer: torch.optim.Optimizer, num: int) -> list[Tensor]:
        for _ in range(num):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.adapter_parameters()]

    expected = steps(*made(), 4)
    model, optimizer = made()
    steps(model, optimizer, 2)
    model(IDS, labels=IDS)  # of the step in which it is interrupted
    Checkpoints(tmp_path).save(2, optimizer, model=model)
    model, optimizer = made()
    with pytest.raises(CorollaError, match="amid a run with dropout, at step 2") as caught:
        Checkpoints(tmp_path).restore(optimizer)
    assert caught.value.code is Code.BAD_REQUEST
    assert Checkpoints(tmp_path).restore(optimizer, model=model).step == 2
    for found, wanted in zip(steps(model, optimizer, 2), expected, strict=True):
        assert distance(found, wanted) < 1e-5
    model, optimizer = made()
    Checkpoints(tmp_path).restore(optimizer, model=model)
    model.dropout.step = 0  # other masks: or nothing would depend on them
    assert max(map(distance, steps(model, optimizer, 2), expected)) > 1e-3


def test_any_wiring_gives_the_same_gradients(
    model: Model, setting: Setting, daemon: Daemon, tmp_path: Path
) -> None:
    hidden, gradient = states(3, 7, 64, seed=1), states(3, 7, 64, seed=2)
    peft_of(setting, tmp_path)
    learner = distributed(setting, daemon)
    learner.load_adapter(tmp_path)

    def through(num_hops: int) -> Tensor:
        for _ in range(100):  # each micro-batch draws its way
            with model.passing(hidden) as passed:
                if passed.num_hops == num_hops:
                    inputs: Tensor = model.backward(passed, gradient).inputs
                    return inputs
        raise AssertionError(f"no way of {num_hops} hops in 100 draws")

    def learned() -> list[Tensor]:
        learner.zero_grad()
        learner(IDS, labels=IDS).loss.backward()  # three micro-batches, each its own way
        return [parameter.grad for parameter in learner.adapter_parameters()]

    split, factors = through(2), learned()  # there is no other
    setting.swarm.serve("whole", 0, NUM_BLOCKS).wait_online()
    setting.swarm.wait_covered(setting.client, [2] * 2 + [3] * (NUM_BLOCKS - 2))
    assert distance(through(1), split) < WIRING_TOLERANCE
    for _ in range(4):
        for found, expected in zip(learned(), factors, strict=True):
            assert distance(found, expected) < WIRING_TOLERANCE


def test_a_hop_killed_before_backward_costs_only_the_rerun(model: Model, setting: Setting) -> None:
    check(model, setting.whole, (0, NUM_BLOCKS), between=setting.hops[1].kill)
    check(model, setting.whole, (0, NUM_BLOCKS))  # and forward without it
