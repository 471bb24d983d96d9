"""Optimizers by path, their errors, exact resume of each, and schedules against diffusers' and the formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from qwen_image_finetune.config import ConfigError, OptimizerConfig, SchedulerConfig
from qwen_image_finetune.disk.checkpoint import load_state, save_state, snapshot
from qwen_image_finetune.training.optim import (
    MUON,
    TwoModes,
    build_optimizer,
    build_scheduler,
    optimizer_state,
    restore_optimizer,
)

ADAMW, SGD = "torch.optim.AdamW", "torch.optim.SGD"
ADAM8BIT, PRODIGY = "bitsandbytes.optim.Adam8bit", "prodigyopt.Prodigy"
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": (ADAMW, {"lr": 1e-2, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}),
    "AdamW amsgrad": (ADAMW, {"lr": 1e-2, "amsgrad": True, "foreach": False}),
    "SGD": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}),
    "SGD plain": (SGD, {"lr": 0.01}),
    "Adam8bit": (ADAM8BIT, {"lr": 1e-3, "betas": [0.9, 0.999]}),
    "Prodigy": (PRODIGY, {"lr": 1.0, "betas": [0.9, 0.999], "use_bias_correction": True, "safeguard_warmup": True}),
    "Adafactor": ("torch.optim.Adafactor", {"lr": 1e-2}),
    "Adafactor with a rate of its own": (
        "transformers.optimization.Adafactor",
        {"lr": 1e-2, "scale_parameter": False, "relative_step": False},
    ),
    "Muon": ("torch.optim.Muon", {"lr": 1e-2}),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", {"lr": 1e-3}),
    "PagedAdamW8bit": ("bitsandbytes.optim.PagedAdamW8bit", {"lr": 1e-3}),
    "AdEMAMix8bit": ("bitsandbytes.optim.AdEMAMix8bit", {"lr": 1e-3, "t_alpha": 8, "t_beta3": 8}),
    "Lion": ("pytorch_optimizer.Lion", {"lr": 1e-3}),
    "CAME": ("pytorch_optimizer.CAME", {"lr": 1e-3}),
    "Muon with AdamW": (MUON, {"lr": 1e-2}),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", {"lr": 1e-2, "warmup_steps": 3}),
    "ScheduleFreeAdamW": ("pytorch_optimizer.ScheduleFreeAdamW", {"lr": 1e-2}),
    "RMSprop": ("torch.optim.RMSprop", {"lr": 1e-2, "centered": True, "momentum": 0.5}),
}


def config(class_path: str = ADAMW, **init_args: Any) -> OptimizerConfig:
    return OptimizerConfig(class_path=class_path, init_args=init_args)


def model() -> torch.nn.Sequential:
    """Weights of 8192 elements: bitsandbytes keeps smaller ones in 32 bits. One is zero, as B of a new adapter is."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(64, 128, bias=False), torch.nn.Tanh(), torch.nn.Linear(128, 8, bias=False)
    )
    torch.nn.init.zeros_(network.get_parameter("2.weight"))
    return network


class Trainer:
    """A model, its optimizer and schedule; the data of a step are a function of its number."""

    def __init__(self, class_path: str, init_args: dict[str, Any]) -> None:
        self.model = model()
        self.optimizer = build_optimizer(config(class_path, **init_args), self.model.parameters())
        schedule = SchedulerConfig(scheduler_type="cosine", warmup_steps=2)
        self.schedule = build_scheduler(schedule, self.optimizer, total_steps=12)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            inputs, targets = torch.randn(4, 64, generator=generator), torch.randn(4, 8, generator=generator)
            torch.nn.functional.mse_loss(self.model(inputs), targets).backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {
            "weights": dict(self.model.named_parameters()),
            "optimizer": optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, folder: Path) -> tuple[str, ...]:
        self.model.load_state_dict(load_state(folder, "weights"))
        notes = restore_optimizer(self.optimizer, load_state(folder, "optimizer"))
        self.schedule.load_state_dict(load_state(folder, "schedule"))
        return notes


def assert_identical(one: Any, other: Any, where: str = "state") -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_identical(left, right, f"{where}.{index}")
    else:
        assert one == other, where


# Exact resume


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_steps_saved_and_five_more_equal_ten(tmp_path: Path, name: str) -> None:
    whole = Trainer(*OPTIMIZERS[name])
    whole.train(0, 10)

    first = Trainer(*OPTIMIZERS[name])
    first.train(0, 5)
    save_state(tmp_path, snapshot(first.state()))
    second = Trainer(*OPTIMIZERS[name])
    assert second.load(tmp_path) == ()
    assert_identical(first.state(), second.state())
    second.train(5, 10)
    assert_identical(whole.state(), second.state())

    fresh = Trainer(*OPTIMIZERS[name])
    for before, after in zip(fresh.model.parameters(), whole.model.parameters(), strict=True):
        assert not torch.equal(before, after), "nothing was trained"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_before_the_first_step(tmp_path: Path, name: str) -> None:
    whole, resumed = Trainer(*OPTIMIZERS[name]), Trainer(*OPTIMIZERS[name])
    save_state(tmp_path, snapshot(whole.state()))
    resumed.load(tmp_path)
    whole.train(0, 3)
    resumed.train(0, 3)
    assert_identical(whole.state(), resumed.state())


def test_adam8bit_is_saved_in_8_bits(tmp_path: Path) -> None:
    trainer = Trainer(*OPTIMIZERS["Adam8bit"])
    trainer.train(0, 1)
    save_state(tmp_path, {"optimizer": trainer.optimizer.state_dict()})
    state = load_state(tmp_path, "optimizer")["state"]
    first = state[0]["__bnb_optimizer_quant_state__"]
    assert (first["state1"].dtype, first["state2"].dtype) == (torch.uint8, torch.uint8)
    assert first["absmax1"].shape == (8192 / 256,)


def test_state_of_another_optimizer_or_model_is_refused() -> None:
    saved = optimizer_state(Trainer(*OPTIMIZERS["AdamW"]).optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.class_path=.*SGD, but the checkpoint was trained with .*AdamW"):
        restore_optimizer(Trainer(*OPTIMIZERS["SGD"]).optimizer, saved)
    other = build_optimizer(config(lr=1e-2), [torch.nn.Parameter(torch.zeros(128, 64)), torch.zeros(4, 128)])
    with pytest.raises(ConfigError, match=r"tensor 1 was \[8, 128\] and is \[4, 128\]"):
        restore_optimizer(other, saved)
    fewer = build_optimizer(config(lr=1e-2), [torch.nn.Parameter(torch.zeros(128, 64))])
    with pytest.raises(ConfigError, match="2 tensors, this run trains 1; the first difference: their number"):
        restore_optimizer(fewer, saved)


def test_options_that_changed_since_the_checkpoint_are_named() -> None:
    saved = optimizer_state(Trainer(ADAMW, {"lr": 1e-2, "betas": [0.9, 0.99]}).optimizer)
    resumed = Trainer(ADAMW, {"lr": 2e-2, "betas": [0.9, 0.99], "weight_decay": 0.5})
    assert restore_optimizer(resumed.optimizer, saved) == (
        "optimizer.init_args.lr=0.02 has no effect: the resumed run goes on with 0.01",
        "optimizer.init_args.weight_decay=0.5 has no effect: the resumed run goes on with 0.01",
    )


# Building


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_class_and_arguments(name: str) -> None:
    class_path, init_args = OPTIMIZERS[name]
    optimizer = build_optimizer(config(class_path, **init_args), model().parameters())
    assert type(optimizer).__name__ == class_path.rpartition(".")[2]
    for key, value in init_args.items():
        assert optimizer.param_groups[0][key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("class_path", "init_args", "message"), [
    (ADAMW, {"lr": 1e-4, "weight_decy": 0.1},
     r"init_args\.weight_decy is not an argument of torch\.optim\.AdamW; did you mean weight_decay\? It takes lr"),
    (ADAMW, {"xyzzy": 1}, r"init_args\.xyzzy is not an argument of torch\.optim\.AdamW\. It takes lr, betas"),
    (ADAMW, {"params": []}, r"optimizer\.init_args\.params is not an argument"),
    (ADAMW, {"lr": "1e-4"}, r"optimizer\.init_args\.lr='1e-4' is not a number, such as 0\.001; write it without"),
    (ADAM8BIT, {"lr": "1e-4"}, r"optimizer\.init_args\.lr='1e-4' is not a number"),
    (PRODIGY, {"d_coef": "2"}, r"optimizer\.init_args\.d_coef='2' is not a number"),
    (ADAMW, {"lr": True}, r"optimizer\.init_args\.lr=True is not a number"),
    (ADAMW, {"betas": [0.9, "0.999"]}, r"optimizer\.init_args\.betas=\[0\.9, '0\.999'\] is not a number"),
    (ADAMW, {"lr": -1.0}, r"optimizer\.init_args=\{'lr': -1\.0\} is refused by torch\.optim\.AdamW: Invalid learning"),
    (ADAMW, {"lr": None}, r"optimizer\.init_args=\{'lr': None\} is refused by torch\.optim\.AdamW"),
    (ADAMW, {"betas": 0.9}, r"optimizer\.init_args=\{'betas': 0\.9\} is refused"),
    ("torch.optim.LBFGS", {}, "evaluates the loss several times a step"),
    ("torch.optim.AdamV", {}, r"optimizer\.class_path='torch\.optim\.AdamV'"),
    ("torch.nn.Linear", {}, r"optimizer\.class_path='torch\.nn\.Linear' is not a subclass of .*Optimizer"),
    ("os.system", {}, r"optimizer\.class_path='os\.system' is not a subclass"),
    ("subprocess.Popen", {"args": "touch /tmp/canary"}, "is not a subclass"),
    ("no_such_package.Adam", {}, r"optimizer\.class_path='no_such_package\.Adam'"),
])  # fmt: skip
def test_mistakes_are_named(class_path: str, init_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(config(class_path, **init_args), model().parameters())


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules matches no module"):
        build_optimizer(config(lr=1e-4), [])


def test_adam_is_fused_unless_told_otherwise() -> None:
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        parameters = [torch.nn.Parameter(torch.zeros(4, device=device))]
        assert build_optimizer(config(lr=1e-4), parameters).param_groups[0]["fused"] is True
        assert build_optimizer(config(lr=1e-4, fused=False), parameters).param_groups[0]["fused"] is False
        assert build_optimizer(config(lr=1e-4, foreach=True), parameters).param_groups[0]["fused"] is None
    elsewhere = [torch.nn.Parameter(torch.zeros(4, device="meta"))]
    assert build_optimizer(config(lr=1e-4), elsewhere).param_groups[0]["fused"] is None


@pytest.mark.parametrize("class_path", [ADAMW, "torch.optim.Adam"])
def test_the_fused_update_is_the_formula(class_path: str) -> None:
    """Against torch's own loop in float64; what is left between the two is rounding."""
    given = {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1}
    ours, slow = Trainer(class_path, given), Trainer(class_path, {**given, "foreach": False})
    slow.model.double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for fast, exact in zip(ours.model.parameters(), slow.model.parameters(), strict=True):
            fast.grad = torch.randn(fast.shape, generator=generator)
            exact.grad = fast.grad.double()
        ours.optimizer.step()
        slow.optimizer.step()
    for fast, exact in zip(ours.model.parameters(), slow.model.parameters(), strict=True):
        torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_the_loop_goes_on_with_the_loop(tmp_path: Path) -> None:
    """Checkpoints of before updates were fused are resumed to the bit, and nothing is said of it."""
    looped = {"lr": 1e-2, "foreach": False}
    whole, first, second = (Trainer(ADAMW, each) for each in (looped, looped, {"lr": 1e-2}))
    whole.train(0, 10)
    first.train(0, 5)
    for group in first.optimizer.param_groups:
        group["foreach"] = None  # as it stood there when nobody had asked
    save_state(tmp_path, snapshot(first.state()))
    assert second.load(tmp_path) == ()
    second.train(5, 10)
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
    assert second.optimizer.param_groups[0]["fused"] is None


# Schedules

LR, TOTAL, WARMUP = 0.1, 20, 4


def rates(**fields: Any) -> list[float]:
    optimizer: Optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = build_scheduler(SchedulerConfig(**fields), optimizer, TOTAL)
    found = []
    for _ in range(TOTAL + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def share(step: int) -> float:
    """How far the decay has come."""
    return (step - WARMUP) / (TOTAL - WARMUP)


def cosine(step: int, cycles: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * share(step))))


def restarts(step: int, cycles: int) -> float:
    return 0.0 if share(step) >= 1 else 0.5 * (1 + math.cos(math.pi * (cycles * share(step) % 1)))


@pytest.mark.parametrize(("fields", "decay"), [
    ({"scheduler_type": "constant_with_warmup"}, lambda step: 1.0),
    ({"scheduler_type": "linear"}, lambda step: 1 - share(step)),
    ({"scheduler_type": "cosine"}, lambda step: cosine(step, 0.5)),
    ({"scheduler_type": "cosine", "num_cycles": 1.5}, lambda step: cosine(step, 1.5)),
    ({"scheduler_type": "cosine_with_restarts"}, lambda step: restarts(step, 1)),
    ({"scheduler_type": "cosine_with_restarts", "num_cycles": 3.0}, lambda step: restarts(step, 3)),
    ({"scheduler_type": "polynomial", "power": 2.0}, lambda step: (1 - share(step)) ** 2),
])  # fmt: skip
def test_schedules_follow_their_formulas(fields: dict[str, Any], decay: Any) -> None:
    found = rates(warmup_steps=WARMUP, **fields)
    expected = [LR * (step / WARMUP if step < WARMUP else decay(step)) for step in range(TOTAL + 1)]
    assert found == pytest.approx(expected, abs=2e-7)  # polynomial ends at 1e-7


def test_constant_has_no_warm_up() -> None:
    assert rates(scheduler_type="constant", warmup_steps=WARMUP) == [LR] * (TOTAL + 1)


@pytest.mark.parametrize("warmup", [TOTAL, 5 * TOTAL])
@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_a_run_that_ends_within_its_warm_up(name: str, warmup: int) -> None:
    found = rates(scheduler_type=name, warmup_steps=warmup)
    assert found[:TOTAL] == pytest.approx([LR * step / warmup for step in range(TOTAL)])


def test_schedule_mistakes_are_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-9)
    with pytest.raises(ConfigError, match=r"lr_scheduler\.scheduler_type=polynomial: lr_end"):
        build_scheduler(SchedulerConfig(scheduler_type="polynomial"), optimizer, TOTAL)


def test_muon_has_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))
    own = torch.nn.Parameter(vector.detach().clone())
    arguments = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-10}
    ours = build_optimizer(config(MUON, lr=0.1, adamw_lr=1e-3), [matrix, vector])
    theirs = torch.optim.AdamW([own], **arguments)
    before = matrix.detach().clone()
    matrix.grad, vector.grad = torch.randn(6, 4), torch.randn(4)
    own.grad = vector.grad.clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(vector, own)
    lengths = torch.linalg.svdvals((before - matrix).detach() / 0.1)  # orthogonal, up to a factor and its iteration
    assert lengths.max() / lengths.min() < 2


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeAdamW"])
def test_schedule_free_ones_are_ready_to_train(name: str) -> None:
    assert isinstance(Trainer(*OPTIMIZERS[name]).optimizer, TwoModes)
    assert not isinstance(Trainer(*OPTIMIZERS["AdamW"]).optimizer, TwoModes)
