"""Proposes captions with a vision-language model. A person reads each of them before it becomes one.

Such models are wrong about pairs nearly every other time (EditCaption, arXiv 2604.08213), so that nothing is written to
the data set here. A process of its own: it loads a model.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from qwen_image_finetune.config.family import HUB_ID
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.signals import StopSignals
from qwen_image_finetune.studio.pairs import DataSets
from qwen_image_finetune.studio.shelf import Refused, Shelf
from qwen_image_finetune.studio.thumbnails import small

OF_A_PAIR = (
    "The last picture was made from the first by an edit. Write the instruction that asks for this edit, as one short "
    "sentence, and nothing else."
)
OF_A_PICTURE = "Describe this picture in one short sentence, and write nothing else."
SIDE = 768  # longest side of what the model sees, in pixels
LONGEST = 80  # tokens
SECONDS_BETWEEN_WRITES = 2.0


class Writer:
    """A model that looks at pictures and writes."""

    def __init__(self, model: str) -> None:
        """
        Args:
            model: folder or hub id of any image-text model of transformers; code that comes with it is not run.

        Raises:
            Refused: it cannot be talked to.
        """
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(model)
        if not self.processor.chat_template:
            raise Refused(f"{model} has no chat template: choose a model that follows instructions")
        precision = "auto" if self.device.type == "cuda" else None
        found = AutoModelForImageTextToText.from_pretrained(model, dtype=precision, use_safetensors=True)
        self.model = found.to(self.device).eval()

    def write(self, pictures: Sequence[Image]) -> str:
        """What it says of a pair, references first, or of one picture."""
        import torch

        wanted = OF_A_PAIR if len(pictures) > 1 else OF_A_PICTURE
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        asked = [{"role": "user", "content": [*content, {"type": "text", "text": wanted}]}]
        inputs = self.processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            written = self.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        (text,) = self.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return " ".join(text.split()).strip("\"' ")


def model_place(shelf: Shelf, model: str) -> str:
    """A folder of the shelf, or a hub id.

    Raises:
        Refused: it is neither.
    """
    if model and (shelf.root / model).is_dir():
        return str(shelf.sealed(shelf.folder(model)))
    if HUB_ID.fullmatch(model) and "/" in model:
        return model
    raise Refused(f"{model!r} is neither a folder in here nor a hub id, owner/name")


def proposals_file(shelf: Shelf, name: str) -> Path:
    """Where the proposals for a data set are kept."""
    return shelf.own / "proposals" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def read_proposals(shelf: Shelf, name: str) -> dict[str, str]:
    """Proposed captions by the keys of their pairs."""
    file = proposals_file(shelf, name)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def propose(shelf: Shelf, name: str, writer: Writer, only_empty: bool) -> dict[str, str]:
    """Write down a proposal for every pair, or for those without a caption."""
    sets, file, last = DataSets(shelf), proposals_file(shelf, name), time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in sets.listing(name).rows if not (only_empty and sets.caption(row))]
    found = dict[str, str]()
    for number, row in enumerate(rows, start=1):
        try:
            pictures = [small(path, SIDE) for path in (*row.references[:1], row.target)]
        except DataError as error:
            console.say(str(error))
            continue
        found[row.key] = writer.write(pictures)
        console.say(f"{number} of {len(rows)}: {row.key}: {found[row.key]}")
        if time.monotonic() - last > SECONDS_BETWEEN_WRITES:
            last = time.monotonic()
            write_atomic(file, json.dumps(found))
    write_atomic(file, json.dumps(found))
    return found


def main() -> None:
    folder, name, model, which = sys.argv[1:]
    with StopSignals():
        propose(Shelf(Path(folder)), name, Writer(model), which == "empty")


if __name__ == "__main__":
    main()
