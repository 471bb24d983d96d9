"""`qif doctor`: what this machine can do for a run. What can be tried is tried, at the size of a moment."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from qwen_image_finetune import __version__
from qwen_image_finetune.levers.attention import KERNELS, SIXTEEN_BITS, attend, choose
from qwen_image_finetune.levers.compile import Compilation
from qwen_image_finetune.levers.quantized_linear import quantised
from qwen_image_finetune.machine.console import say
from qwen_image_finetune.studio.machine import cards

GIB = 2**30
# GiB: about a checkpoint of 12 billion weights with its encoders; about its base in fp8.
LITTLE_DISK, LITTLE_MEMORY = 40.0, 16.0
OLDEST = (8, 0)  # compute capability with bf16 products
# What requirements.lock has of the packages that matter most; a test compares.
TESTED = {
    "torch": "2.14.1", "diffusers": "0.42.1", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0",
    "safetensors": "0.8.0", "huggingface-hub": "2.4.0", "bitsandbytes": "0.50.2",
}  # fmt: skip
OPTIONAL = frozenset({"bitsandbytes"})
FAILURES = (RuntimeError, ImportError, ValueError, OSError)  # of what is tried: kernels, compilers, missing parts
Work = Callable[[], object]


class Unfit(RuntimeError):
    """No run works on this machine as it is."""


@dataclass(frozen=True)
class Finding:
    """A line of the report. `remedy` is what to do, empty where all is well."""

    name: str
    found: str
    remedy: str = ""
    needed: bool = False  # without it no run works here at all

    @property
    def state(self) -> str:
        """good, note, or bad."""
        return "good" if not self.remedy else "bad" if self.needed else "note"


def doctor(answer: Callable[[object], None] | None) -> None:
    """Print the report, or hand it to `answer` as values.

    Raises:
        Unfit: a line is bad.
    """
    findings = list(examine())
    if answer is not None:
        answer([{**asdict(each), "state": each.state} for each in findings])
    else:
        width = max(len(each.name) for each in findings)
        for each in findings:
            say(f"{each.state:<4}  {each.name:<{width}}  {each.found}")
            if each.remedy:
                say(f"{'':<{width + 8}}-> {each.remedy}")
    if bad := [each.name for each in findings if each.state == "bad"]:
        raise Unfit(f"no run works here before this is mended: {', '.join(bad)}")


def examine() -> Iterator[Finding]:
    """Everything, in the order in which a person would mend it."""
    yield Finding("qwen-image-finetune", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from _driver()
    yield from _room()
    yield from _trials()
    yield from _hub()
    yield from _versions()


def _driver() -> Iterator[Finding]:
    known = cards()
    build = f"torch {torch.__version__}, " + (
        f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    )
    if not known:
        yield Finding("driver", "nvidia-smi finds no card", "training of full-size models needs an NVIDIA card; "
                      "`qif demo` and checks run without one")  # fmt: skip
        yield Finding("torch", build)
        return
    yield Finding("driver", ", ".join(f"{card['name']}, {card['of_memory']:g} GiB" for card in known))
    if not torch.cuda.is_available():
        yield Finding(
            "torch", f"{build}; it sees no card",
            "install a build of torch for a CUDA version that the driver has (pytorch.org/get-started)",
            needed=True,
        )  # fmt: skip
        return
    yield Finding("torch", build)
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        remedy = "" if capability >= OLDEST else "too old for bf16 products: set train.mixed_precision=fp16"
        words = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
        yield Finding(f"card {index}", words, remedy)


def _room() -> Iterator[Finding]:
    if torch.cuda.is_available():
        free, total = (size / GIB for size in torch.cuda.mem_get_info())
        remedy = "" if free > total / 2 else "other programs hold the rest: `nvidia-smi` names them"
        yield Finding("memory of the card", f"{free:.1f} of {total:.1f} GiB free", remedy)
    memory = psutil.virtual_memory()
    free, total = memory.available / GIB, memory.total / GIB
    remedy = "" if free > LITTLE_MEMORY else "blocks that wait in host memory need it: close other programs"
    yield Finding("memory of the host", f"{free:.1f} of {total:.1f} GiB free", remedy)
    disk = shutil.disk_usage(Path.cwd())
    remedy = "" if disk.free / GIB > LITTLE_DISK else "checkpoints and caches need room: use another disk, or clean up"
    yield Finding("disk here", f"{disk.free / GIB:.0f} of {disk.total / GIB:.0f} GiB free", remedy)


def _trials() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose("auto", device, torch.bfloat16)
    for name in dict.fromkeys([chosen, *KERNELS]):
        remedy = "it is what train.attention=auto takes here: name another one that works" if name == chosen else (
            f"not needed: train.attention=auto takes {chosen}"
        )  # fmt: skip
        yield _tried(f"attention {name}", lambda name=name: _attend(name, device), remedy)  # type: ignore[misc]
    yield _tried("fp8 base", lambda: _product("fp8", device), "leave model.quantize=fp8 out, or take nf4")
    yield _tried(
        "bitsandbytes", lambda: _product("nf4", device), "pip install 'qwen-image-finetune[bitsandbytes]', for bases "
        "of 4 bits and 8-bit optimizers"
    )  # fmt: skip
    yield _tried("compile", lambda: _compile(device), "leave train.compile=false, or install a C compiler and Triton")


def _tried(name: str, work: Work, remedy: str) -> Finding:
    try:
        work()
    except FAILURES as error:
        reason = str(error).strip().splitlines()
        return Finding(name, f"does not run: {reason[0] if reason else type(error).__name__}", remedy)
    return Finding(name, "runs, forward and backward")


def _attend(name: str, device: torch.device) -> None:
    query = torch.randn(1, 64, 2, 64, dtype=SIXTEEN_BITS[0], device=device, requires_grad=True)
    attend(query, query, query, None, name).float().sum().backward()
    _synchronise(device)


def _product(format: str, device: torch.device) -> None:
    layer = quantised(torch.randn(64, 64, device=device), format)
    input = torch.randn(32, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    layer(input).float().sum().backward()
    _synchronise(device)


def _compile(device: torch.device) -> None:
    run = Compilation().wrap(lambda given: torch.nn.functional.gelu(given * 2).sum())
    run(torch.randn(8, 8, device=device, requires_grad=True)).backward()
    _synchronise(device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_CACHE

    logged_in = get_token() is not None
    remedy = "" if logged_in else "models with a licence to accept (FLUX) ask for one: hf auth login"
    yield Finding("login at the hub", "a token is stored" if logged_in else "no token", remedy)
    cache = Path(HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free / GIB
    remedy = "" if free > LITTLE_DISK else "a full-size model may not fit: let HF_HOME name a folder on a larger disk"
    yield Finding("cache of the hub", f"{cache}, {free:.0f} GiB free", remedy)


def _versions() -> Iterator[Finding]:
    for name, tested in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            if name not in OPTIONAL:
                yield Finding(
                    f"version of {name}", "not installed", f"{sys.executable} -m pip install {name}", needed=True
                )
            continue
        same = found.split("+")[0] == tested
        remedy = "" if same else f"tests ran with {tested}: take that one if something behaves oddly"
        yield Finding(f"version of {name}", found, remedy)
