"""Every attention equals the plain one, masks included; what was chosen is what runs, also compiled and recomputed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from tiny_transformers import forward, run, tiny_transformer
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers import attention
from qwen_image_finetune.levers.attention import attend, choose, use_attention

CPU = torch.device("cpu")
H100 = torch.device("cuda", 0)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, T, heads, D) and logsumexp (B, heads, T), in float64."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)


@pytest.fixture
def flash_4(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the package's two functions, computed plainly; the list names the calls."""
    calls: list[str] = []
    interface: Any = ModuleType("flash_attn.cute.interface")

    def fwd(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False) -> tuple[Tensor, Tensor]:
        calls.append("forward")
        assert return_lse
        assert query.is_contiguous()
        output, logsumexp = plain(query, key, value, None)
        return output.to(query.dtype).contiguous(), logsumexp.float()

    def bwd(query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor, logsumexp: Tensor) -> Any:
        calls.append("backward")
        q, k, v, o, g = (tensor.double().transpose(1, 2) for tensor in (query, key, value, output, gradient))
        share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - logsumexp.double()[..., None]).exp()
        slope = share * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        found = slope @ k, slope.transpose(-1, -2) @ q, share.transpose(-1, -2) @ g
        return tuple(tensor.transpose(1, 2).to(query.dtype).contiguous() for tensor in found)

    interface._flash_attn_fwd, interface._flash_attn_bwd = fwd, bwd
    cute: Any = ModuleType("flash_attn.cute")
    cute.interface = interface
    for name, module in (
        ("flash_attn", ModuleType("flash_attn")),
        (cute.__name__, cute),
        (interface.__name__, interface),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention, "_flash_4_interface", lambda: interface)
    if not OPERATORS:  # an operator can be defined once in a process; it then calls the first interface it saw
        OPERATORS.append((attention.flash_attention_4(), calls))
    monkeypatch.setattr(attention, "flash_attention_4", lambda: OPERATORS[0][0])
    OPERATORS[0][1].clear()
    return OPERATORS[0][1]


OPERATORS: list[tuple[Any, list[str]]] = []


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


MASKS = {
    "no mask": None,
    "prompts of unequal length": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    "holes": torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["flash", "math", "flash4"])
def test_equals_plain_attention(name: str, mask: str, flash_4: list[str]) -> None:
    """Forward and all gradients, against float64. Padding is among the first keys: text stands before pictures."""
    padding, keep = MASKS[mask], None
    if padding is not None:
        keep = torch.cat([padding, torch.ones(2, 12)], dim=1).bool()[:, None, None, :]
    tensors = [random(2, 17, 3, 16, seed=seed).requires_grad_() for seed in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    gradient = random(2, 17, 3, 16, seed=3)
    if name == "flash4" and keep is not None:
        name = "math"  # what a card would do with `efficient`, which the CPU has not
    output = attend(*tensors, keep, name)
    reference, _ = plain(*exact, keep)
    output.backward(gradient)
    reference.backward(gradient.double())
    assert torch.allclose(output.double(), reference, atol=2e-6)
    for got, expected in zip(tensors, exact, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        assert torch.allclose(got.grad.double(), expected.grad, atol=2e-5)
    assert flash_4 == (["forward", "backward"] if name == "flash4" else [])


@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("name", ["flash", "math", "flash4"])
def test_a_model_computes_the_same(family: str, name: str, flash_4: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer(family)
    if family == "qwen":  # without padding there is no mask
        whole = model.forward
        model.forward = lambda **arguments: whole(**arguments | {"encoder_hidden_states_mask": None})
    expected = run(model)
    monkeypatch.setattr(attention, "_able", lambda device, dtype: ["flash4", "flash", "math"])
    assert use_attention(model, name, "no") == name
    assert torch.allclose(run(model), expected, atol=1e-5)
    layers = len(model.transformer_blocks) + (2 if family == "flux" else 0)
    assert flash_4 == (["forward"] * layers if name == "flash4" else [])


def test_masked_text_of_a_model_is_not_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer("qwen")
    use_attention(model, "flash", "no")
    outputs = []
    whole = model.forward
    for noise in (0.0, 100.0):
        padding = torch.full((1, 2, 24), noise)

        def padded(padding: Tensor = padding, **arguments: Any) -> Any:
            text = torch.cat([arguments["encoder_hidden_states"], padding], dim=1)
            mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
            return whole(**arguments | {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask})

        model.forward = padded
        outputs.append(run(model))
    assert torch.equal(*outputs)


def test_choice_is_of_one_model(flash_4: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model of the same class, a validation pipeline's say, keeps what diffusers gave it."""
    monkeypatch.setattr(attention, "_able", lambda device, dtype: ["flash4"])
    chosen, other = tiny_transformer("flux"), tiny_transformer("flux")
    use_attention(chosen, "auto", "no")
    routed = transformer_flux.dispatch_attention_fn
    use_attention(chosen, "auto", "no")
    assert transformer_flux.dispatch_attention_fn is routed, "diffusers' own is called in one step, not through a chain"
    assert (attention.attention_of(chosen), attention.attention_of(other)) == ("flash4", None)
    run(other)
    assert flash_4 == []
    run(chosen)
    assert len(flash_4) == 4


def test_autocast_reaches_flash_4(flash_4: list[str]) -> None:
    """Norms hand on float32 queries and keys under autocast, and 16-bit values; the kernel takes 16 bits of all."""
    query, key = random(1, 4, 2, 16, seed=0), random(1, 4, 2, 16, seed=1)
    value = random(1, 4, 2, 16, seed=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(query, key, value, None, "flash4").dtype == torch.bfloat16
    assert flash_4 == ["forward"]


def test_flash_4_does_not_break_a_graph(flash_4: list[str]) -> None:
    class Block(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query * 2, key, value, None, "flash4").relu()

    tensors = [random(1, 6, 2, 16, seed=seed) for seed in range(3)]
    results = []
    for block in (Block(), torch.compile(Block(), backend="aot_eager", fullgraph=True)):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        output = block(*inputs)
        output.sum().backward()
        results.append([output, *(tensor.grad for tensor in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)
    torch.compiler.reset()


def test_operations_of_flash_4_are_counted(flash_4: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tensors = [random(2, 6, 3, 16, seed=seed).requires_grad_() for seed in range(3)]
    with FlopCounterMode(display=False) as counter:
        attend(*tensors, None, "flash4").sum().backward()
    product = 2 * 2 * 3 * 6 * 6 * 16
    assert counter.get_total_flops() == (2 + 5) * product


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "expected"),
    [
        ((9, 0), torch.bfloat16, True, ["flash4", "flash", "efficient", "math"]),
        ((9, 0), torch.bfloat16, False, ["flash", "efficient", "math"]),
        ((10, 0), torch.float16, True, ["flash4", "flash", "efficient", "math"]),
        ((8, 9), torch.bfloat16, True, ["flash", "efficient", "math"]),
        ((9, 0), torch.float32, True, ["efficient", "math"]),
        ((7, 5), torch.float16, True, ["efficient", "math"]),
    ],
)
def test_what_runs_on_which_card(
    capability: tuple[int, int],
    dtype: torch.dtype,
    installed: bool,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(attention, "_flash_4_interface", lambda: object() if installed else None)
    assert choose("auto", H100, dtype) == expected[0]
    for name in ("flash4", "flash", "efficient", "math"):
        if name in expected:
            assert choose(name, H100, dtype) == name
        else:
            with pytest.raises(ConfigError, match=rf"train\.attention='{name}' does not run on a card in"):
                choose(name, H100, dtype)


def test_what_runs_on_the_cpu() -> None:
    assert choose("auto", CPU, torch.float32) == "flash"
    with pytest.raises(
        ConfigError, match=r"'flash4' does not run on the CPU in float32; there are \['flash', 'math'\]"
    ):
        choose("flash4", CPU, torch.float32)


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has an attention of its own"):
        use_attention(nn.Linear(2, 2), "auto", "no")


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_recomputation_attends_in_the_same_way(
    family: str, flash_4: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_able", lambda device, dtype: ["flash4", "math"])
    gradients = []
    for recompute in (False, True):
        model = tiny_transformer(family).train()
        use_attention(model, "flash4" if family == "flux" else "math", "no")
        if recompute:
            model.enable_gradient_checkpointing()
        forward(model).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_recomputation_keeps_the_output_of_flash_4(flash_4: list[str]) -> None:
    """The kernel runs once forward, although everything around it is computed a second time."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    from qwen_image_finetune.levers.recompute import Policy

    tensors = [random(1, 6, 2, 16, seed=seed).requires_grad_() for seed in range(3)]

    def block(*inputs: Tensor) -> Tensor:
        return attend(*(tensor * 2 for tensor in inputs), None, "flash4").relu()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(Policy({}))

    checkpoint(block, *tensors, use_reentrant=False, context_fn=contexts).sum().backward()
    assert flash_4 == ["forward", "backward"]
