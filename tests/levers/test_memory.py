"""Swapped blocks, offloaded activations, released gradients: bit-equal to none, and no more on the card than said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saved_bytes import saved_bytes
from tiny_transformers import disturb, forward, run, tiny_transformer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.levers.offload import Offload, Offloaded
from qwen_image_finetune.levers.quantize import quantize
from qwen_image_finetune.levers.quantized_linear import FP8_SIDE, QuantizedLinear
from qwen_image_finetune.levers.recompute import blocks, recompute
from qwen_image_finetune.levers.release import GradientRelease
from qwen_image_finetune.levers.single_steps import SingleSteps
from qwen_image_finetune.levers.swap import AHEAD, Swap, SwappedBlock, place_of, spread, swap_blocks
from qwen_image_finetune.lora import adapters

FAMILIES = ["flux", "qwen"]
CPU = torch.device("cpu")  # a second place on it stands for the card: other storages than the host's


def adapted(family: str, format: str | None = None) -> Any:
    model = tiny_transformer(family)
    if format:
        quantize(model, format)
    adapters.add_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), seed=1)
    disturb(model)
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    forward(model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert len(expected) > 10
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("format", [None, "fp8"])
@pytest.mark.parametrize("keep", ["none", 0.5])
@pytest.mark.parametrize(("family", "count"), [("flux", 1), ("flux", 2), ("flux", 4), ("qwen", 1), ("qwen", 2)])
def test_swapping_is_bit_equal_to_none(family: str, count: int, keep: Any, format: str | None) -> None:
    plain, swapped = adapted(family, format), adapted(family, format)
    swap_blocks(swapped, count, CPU)
    recompute(swapped, keep)
    assert_same(gradients(plain), gradients(swapped))
    assert torch.equal(run(plain), run(swapped))
    assert_same(gradients(plain), gradients(swapped))  # again, after a run without gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_int8_are_the_same_recomputed_swapped_and_offloaded(family: str) -> None:
    found = []
    for way in ("plain", "recomputed", "swapped", "offloaded"):
        model = tiny_transformer(family, torch.bfloat16)
        quantize(model, "int8")
        adapters.add_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), seed=1)
        disturb(model)
        model.train()
        if way == "swapped":
            swap_blocks(model, 2, CPU)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.computes_in_int8 = "rotation" in layer.state
        if way != "plain":
            recompute(model, 0.5 if way == "recomputed" else "none")
        if way == "offloaded":
            Offload(model, smallest=0)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model))
    for other in found[1:]:
        assert_same(found[0], other)


class Watched(Swap):
    """Counts the copies of swapped blocks that are alive, whoever holds them."""

    def __init__(self, *arguments: Any) -> None:
        self.copies: list[StorageWeakRef] = []
        self.most = 0
        super().__init__(*arguments)

    def _fetch(self, number: int) -> None:
        there = number in self.visiting
        super()._fetch(number)
        if not there:
            self.copies.append(StorageWeakRef(self.visiting[number][0].untyped_storage()))
            self.most = max(self.most, sum(not copy.expired() for copy in self.copies))


@pytest.mark.parametrize("keep", ["none", 0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_than_two_swapped_blocks_are_on_the_card(
    family: str, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_image_finetune.levers.swap.Swap", Watched)
    model = adapted(family)
    swap: Any = swap_blocks(model, 100, CPU)
    recompute(model, keep)
    assert len(swap.waiting) == len(blocks(model))
    for _ in range(2):
        gradients(model)
        run(model)
    assert swap.most == 1 + AHEAD
    assert len(swap.visiting) <= 1 + AHEAD


def test_blocks_compute_with_the_copy_and_rest_in_the_host() -> None:
    model = adapted("flux")
    swap = swap_blocks(model, 2, CPU)
    host = {place_of(block.host) for block in swap.waiting.values()}
    chain = blocks(model)
    used = []

    def note(module: nn.Module, *arguments: Any) -> None:
        used.append({place_of(p) for p in module.parameters() if not p.requires_grad} & host)

    for number in swap.waiting:
        next(m for m in chain[number].modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(note)
    gradients(model)
    assert used == [set(), set()]
    for number in swap.waiting:
        frozen = [p for p in chain[number].parameters() if not p.requires_grad]
        assert {place_of(p) for p in frozen} == {place_of(swap.waiting[number].host)}
        assert all(place_of(p) not in host for p in chain[number].parameters() if p.requires_grad)


def test_swapping_copies_nothing_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_image_finetune.levers.swap.Swap", Watched)
    card = torch.device("cpu", 0)  # a name of the CPU that no tensor uses
    monkeypatch.setattr("qwen_image_finetune.levers.quantized_linear.has_fp8_products", lambda device: device == card)
    model = adapted("flux", "fp8")
    swap: Any = swap_blocks(model, 2, card)
    assert not swap.copies
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) > 10
    aligned = [all(side % FP8_SIDE == 0 for side in layer.shape) for layer in layers]
    assert any(aligned)
    assert [layer.computes_in_fp8 for layer in layers] == aligned


def test_a_swapped_model_has_the_state_of_any_other() -> None:
    plain, swapped = adapted("qwen", "fp8"), adapted("qwen", "fp8")
    swap_blocks(swapped, 1, CPU)
    gradients(swapped)
    assert_same(plain.state_dict(), swapped.state_dict())


def test_recomputation_that_ends_early_leaves_nothing_on_the_card() -> None:
    model = adapted("flux")
    swap = swap_blocks(model, 4, CPU)
    recompute(model, "none")
    gradients(model)
    for number, block in enumerate(blocks(model)):
        assert {place_of(p) for p in block.parameters() if not p.requires_grad} == {place_of(swap.waiting[number].host)}


def test_page_locks_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is told, in order; tests/gpu asks the driver itself."""
    told: list[Any] = []

    class Driver:
        def cudaHostRegister(self, place: int, size: int, flags: int) -> int:
            told.append(("lock", place))
            return 0

        def cudaHostUnregister(self, place: int) -> int:
            told.append(("unlock", place))
            return 0

    monkeypatch.setattr("torch.cuda.cudart", Driver)
    monkeypatch.setattr("torch.cuda.synchronize", told.append)
    card = torch.device("cuda", 0)
    block = SwappedBlock(nn.Linear(8, 8).requires_grad_(False), card)
    place = block.host.data_ptr()
    assert told == [("lock", place)]
    del block
    assert told == [("lock", place), card, ("unlock", place)]
    SwappedBlock(nn.Linear(8, 8).requires_grad_(False), CPU)
    SwappedBlock(nn.Linear(8, 8).requires_grad_(False), torch.device("xpu"))
    assert len(told) == 3


def test_swapped_blocks_are_spread_evenly() -> None:
    assert spread(0, 5) == []
    assert spread(2, 4) == [1, 3]
    assert spread(3, 57) == [9, 28, 47]
    assert spread(9, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("keep", [None, "none", 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloading_is_bit_equal_to_none(family: str, keep: Any) -> None:
    plain, offloaded = adapted(family), adapted(family)
    offload = Offload(offloaded, smallest=0)
    if keep is not None:
        recompute(plain, keep)
        recompute(offloaded, keep)
    assert_same(gradients(plain), gradients(offloaded))
    assert offload.bytes > 0
    assert torch.equal(run(plain), run(offloaded))


@pytest.mark.parametrize("keep", [None, "none", 0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_offloaded_tensor_comes_back_once(family: str, keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Counted] = []

    class Counted(Offloaded):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.copies = 0
            made.append(self)

        def fetch(self) -> None:
            self.copies += self.returned is None
            super().fetch()

    monkeypatch.setattr("qwen_image_finetune.levers.offload.Offloaded", Counted)
    model = adapted(family)
    Offload(model, smallest=0)
    if keep is not None:
        recompute(model, keep)
    for _ in range(2):
        gradients(model)
    assert {saved.copies for saved in made if saved.taken} == {1}
    assert all(saved.copies <= 1 for saved in made)  # Qwen's last block has text that no gradient asks for
    assert sum(saved.taken for saved in made) > 10


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    model = adapted("flux")
    Offload(model, smallest=0)
    loss = forward(model).square().sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, torch.autograd.grad(loss, parameters), strict=True))


def test_offloading_takes_activations_and_leaves_weights() -> None:
    model = adapted("flux")
    everything = saved_bytes(model, forward)
    offload = Offload(model, smallest=0)
    seen = []
    offload.pack = lambda tensor, pack=offload.pack: seen.append((tensor, pack(tensor))) or seen[-1][1]  # type: ignore[method-assign]
    forward(model)
    weights = {place_of(p) for p in model.parameters()}
    assert all(isinstance(packed, torch.Tensor) == (place_of(tensor) in weights) for tensor, packed in seen)
    assert 0 < everything <= offload.bytes  # views of one tensor are counted one by one


def test_small_tensors_are_not_offloaded() -> None:
    model = adapted("flux")
    offload = Offload(model)
    gradients(model)
    assert offload.bytes == 0


def test_offloading_ends_with_a_run_that_fails() -> None:
    model = adapted("flux")
    offload = Offload(model, smallest=0)
    with pytest.raises(TypeError):
        model(hidden_states=None, timestep=torch.zeros(1), nonsense=1)
    before = offload.bytes
    (torch.ones(3, requires_grad=True) * torch.ones(3)).sum().backward()
    assert offload.bytes == before


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_released_gradients_train_as_ordinary_steps_do(kind: Any) -> None:
    def train(release: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        model = tiny_transformer("flux")
        adapters.make_everything_trainable(model.train())
        optimizer = kind(model.parameters(), lr=1e-3)
        released = GradientRelease(SingleSteps(optimizer), model.parameters()) if release else None
        norms = []
        for _ in range(3):
            forward(model).square().sum().backward()
            if released is not None:
                assert all(p.grad is None for p in model.parameters())
                norms.append(float(released.take_norm()))
            else:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
                optimizer.step()
                optimizer.zero_grad()
        assert len(optimizer.state) == sum(1 for _ in model.parameters() if kind is not torch.optim.SGD)
        return {name: p.detach().clone() for name, p in model.named_parameters()}, norms

    (expected, norms), (found, taken) = train(False), train(True)
    assert_same(expected, found)
    assert taken == pytest.approx(norms, rel=1e-5)
