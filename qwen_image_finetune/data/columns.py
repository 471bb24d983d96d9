"""Which columns of a data set are target, references, prompt and mask: as the configuration says, or known by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_image_finetune.config import Columns


@dataclass(frozen=True)
class Layout:
    """The columns of a data set; a column of references may hold one picture or a list."""

    target: str
    references: tuple[str, ...]
    prompt: str
    mask: str | None = None
    turns: str | None = None  # the one column there is: a list of edits, each of which has the others

    @property
    def names(self) -> list[str]:
        """Columns to read, each once."""
        if self.turns is not None:
            return [self.turns]
        return list(dict.fromkeys([self.target, *self.references, self.prompt, *([self.mask] if self.mask else [])]))


# Layouts of published data sets by the names of their columns: the first that a data set has all of, but for masks.
KNOWN = {
    "instruct-pix2pix": Layout("edited_image", ("original_image",), "edit_prompt"),
    "instruct-pix2pix, samples": Layout("edited_image", ("input_image",), "edit_prompt", "mask"),
    "MagicBrush": Layout("target_img", ("source_img",), "instruction", "mask_img"),
    "OmniEdit": Layout("edited_img", ("src_img",), "edited_prompt_list"),
    "HQ-Edit": Layout("output_image", ("input_image",), "edit"),
    "ImgEdit": Layout("output_images", ("input_images",), "prompt"),
    "ImgEdit, several turns": Layout("output_images", ("input_images",), "prompt", turns="data"),
    "the guide's": Layout("target_image", ("control_images",), "prompt", "control_mask"),
    "target and source": Layout("target", ("source",), "prompt", "mask"),
    "output and input": Layout("output", ("input",), "prompt", "mask"),
    "pictures with texts beside them": Layout("target", ("source",), "txt", "mask"),
    "outputs with texts beside them": Layout("output", ("input",), "txt", "mask"),
    "image and edit_image": Layout("image", ("edit_image",), "prompt", "mask"),
    "captions": Layout("image", (), "txt"),
    "captions in a column": Layout("image", (), "text"),
}


def layout_of(names: Sequence[str], given: Columns | None) -> Layout | str:
    """The layout of a data set that has these columns, or why there is none."""
    if given is not None:
        references = (given.references,) if isinstance(given.references, str) else tuple(given.references)
        layout = Layout(given.target, references, given.prompt, given.mask)
        lacking = [name for name in layout.names if name not in names]
        return layout if not lacking else f"no column {', '.join(lacking)}; it has {_listed(names)}"
    for known in KNOWN.values():
        if known.turns is not None:
            if list(names) == known.names:
                return known
        elif all(name in names for name in (known.target, *known.references, known.prompt)):
            mask = known.mask if known.mask in names else None
            return Layout(known.target, known.references, known.prompt, mask)
    return (
        f"its columns ({_listed(names)}) are of no layout that is known: say which they are, as an entry of "
        "data.init_args.dataset_path: {path: ..., columns: {target: ..., references: ..., prompt: ...}}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
