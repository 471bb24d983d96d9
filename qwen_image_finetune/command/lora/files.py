"""What the tools share: whose LoRA a file is, and a result that is kept only if it does what it should."""

from __future__ import annotations

from pathlib import Path

from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.export import is_export
from qwen_image_finetune.lora.header import LoraFileError, read_metadata
from qwen_image_finetune.lora.layers import Layer, kind_of
from qwen_image_finetune.lora.names import Naming
from qwen_image_finetune.lora.reading import LoraFile, read_lora
from qwen_image_finetune.lora.sources import find_lora


def family_of(path: Path, asked: str | None) -> str:
    """Whose LoRA a file is: as asked, as the file says, or the one family whose modules are called so.

    Raises:
        LoraFileError: no family has such modules, or several have.
    """
    if asked is not None:
        return asked
    said = read_metadata(path).get("qif.family")
    if said in FAMILIES:
        return str(said)
    fitting = [name for name in sorted(FAMILIES) if _fits(path, get_family(name).naming)]
    if len(fitting) == 1:
        return fitting[0]
    found = f"fits {', '.join(fitting)}" if fitting else "fits no family by the names of its layers"
    raise LoraFileError(f"{path} does not say of which model it is, and {found}: say --family")


def _fits(path: Path, naming: Naming) -> bool:
    try:
        read_lora(path, naming)
    except LoraFileError:
        return False
    return True


def opened(source: Path, asked: str | None) -> tuple[LoraFile, str]:
    """A LoRA file and its family.

    Raises:
        LoraFileError: it cannot be read, or is not of that family.
    """
    path = find_lora(source)
    family = family_of(path, asked)
    return read_lora(path, get_family(family).naming), family


def plain(file: LoraFile, doing: str) -> dict[str, Layer]:
    """The layers of a file that holds low-rank changes and nothing else.

    Raises:
        LoraFileError: it is of another kind.
    """
    layers = {name: layer for name, layer in file.layers.items() if isinstance(layer, Layer)}
    kind = kind_of(file.layers)
    if kind != "LoRA" or len(layers) < len(file.layers):
        raise LoraFileError(f"{file.path} is a {kind}, and only a plain LoRA can be {doing}")
    return layers


def check_place(output: Path, overwrite: bool) -> None:
    """Refuse an output before anything is computed.

    Raises:
        OutputError, LoraFileError: it is another's, or no .safetensors.
    """
    if output.suffix != ".safetensors":
        raise LoraFileError(f"{output}: a LoRA file ends in .safetensors")
    check_output(output, overwrite, is_export)
