"""Names of modules: what a model's authors call them, and which one a tensor of a LoRA file means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from qwen_image_finetune.lora.readers import Reader


@dataclass(frozen=True)
class Native:
    """A module under its authors' name: the diffusers modules in it, from the first output row to the last."""

    modules: tuple[str, ...]
    rows: tuple[int, ...] = (1,)  # output rows of each module, in shares of each other
    halves_swapped: bool = False  # (shift, scale) where diffusers has (scale, shift)
    weight: str = "weight"  # what its weight is called


USUAL_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of attention, as most models call them

Names = Mapping[str, Native]  # by the authors' names; {} stands for the number of a block

# Words that programs put before the name of a module: transformer., model.diffusion_model., base_model.model.,
# transformer.transformer., lora_unet_, lora_transformer_, lycoris_, _orig_mod., pipe.dit., ... in any order.
WRAPPERS = frozenset(
    ("", "lora", "lycoris", "unet", "transformer", "model", "base", "diffusion", "pipe", "dit", "net", "module")
) | {"orig", "mod", "prior"}  # fmt: skip
PARTS = ("down", "up", "alpha", "magnitude", "dora_scale")
_PARTS = re.compile(
    r"^(?P<path>.+?)\.(?:(?P<down>(lora_A|lora_down)(\..+)?\.weight|lora\.down\.weight)"
    r"|(?P<up>(lora_B|lora_up)(\..+)?\.weight|lora\.up\.weight)|(?P<alpha>alpha)"
    r"|(?P<magnitude>lora_magnitude_vector(\..+)?)|(?P<dora_scale>dora_scale)"
    r"|(?P<other>(lokr_w[12]|hada_w[12])(_[ab])?|oft_R\.weight))$"
)


@dataclass(frozen=True)
class Naming:
    """What has to be known of a model to read and write its LoRA files."""

    pipeline: type[Any]  # diffusers' class, whose own conversion knows further dialects
    native: Names
    readers: tuple[Reader, ...]  # programs that read its files
    published: Callable[[], Iterable[nn.Module]]  # makes its transformers as they are published, without memory

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every linear layer of the published models, for files that are read without a model."""
        from qwen_image_finetune.lora.targets import linear_modules

        return tuple(dict.fromkeys(name for model in self.published() for name in linear_modules(model)))


class Places:
    """Where a tensor of a LoRA file may belong: the modules of a transformer, as diffusers or its authors call them."""

    def __init__(self, modules: Iterable[str], native: Names) -> None:
        authors = {part: name for name, known in native.items() for part in known.modules}
        names: dict[str, None] = {}
        for module in modules:
            names[module] = None
            template, number = numbered(module)
            if template in authors:
                names[authors[template].replace("{}", number)] = None
        self.names = tuple(names)
        # Dots may be underscores: lora_unet_transformer_blocks_0_attn_to_q. No two names are the same then.
        self._names = {flattened(name): name for name in names} | {name: name for name in names}

    def find(self, path: str) -> str | None:
        """The name of the module that `path` ends in, where nothing but words of WRAPPERS stands before it."""
        for start in _starts(path):
            if found := self._names.get(path[start:]):
                return found
        return None

    def nearest(self, path: str) -> str | None:
        """The name that looks most like what stands behind the known words of `path`."""
        *_, start = _starts(path)
        found = difflib.get_close_matches(flattened(path[start:]), self._names, n=1, cutoff=0.5)
        return self._names[found[0]] if found else None


def split_key(key: str) -> tuple[str, str] | None:
    """(path of the module, one of PARTS) of a tensor's name; its own last name where it is of no LoRA but another kind
    of adapter, and None where it is of none."""
    match = _PARTS.match(key)
    if match is None:
        return None
    return match["path"], match["other"] or next(part for part in PARTS if match[part] is not None)


def numbered(module: str) -> tuple[str, str]:
    """'single_blocks.7.linear1' -> 'single_blocks.{}.linear1', '7'."""
    match = re.search(r"blocks\.(?:[a-z_]+\.)?(\d+)", module)  # or 'mode_blocks.image.7.attn.to_q'
    return (module, "") if match is None else (module[: match.start(1)] + "{}" + module[match.end() :], match[1])


def authors_home(names: Names) -> Callable[[str], tuple[str, Native, str]]:
    """What finds, of a module of diffusers, its authors' name for where it is, what that holds, and its own template.

    A module that they call the same has a home of its own.
    """
    homes = {part: (name, native) for name, native in names.items() for part in native.modules}

    def find(module: str) -> tuple[str, Native, str]:
        template, number = numbered(module)
        name, native = homes.get(template, (module, Native((template,))))
        return name.replace("{}", number), native, template

    return find


def exactly(modules: Iterable[str]) -> str:
    """An expression that matches these names and no other; endings would match more."""
    return "|".join(re.escape(module) for module in modules)


def flattened(module: str) -> str:
    """A name with underscores for its dots."""
    return module.replace(".", "_")


def _starts(path: str) -> Iterator[int]:
    """Places in `path` before which only words of WRAPPERS stand, from the first to the last."""
    yield 0
    for mark in re.finditer(r"[._]", path):
        if not WRAPPERS.issuperset(re.split(r"[._]", path[: mark.start()])):
            return
        yield mark.end()
