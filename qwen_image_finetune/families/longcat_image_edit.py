"""LongCat-Image-Edit: blocks and autoencoder of FLUX.1, Qwen2.5-VL text that looks at the reference.

Oracle: `diffusers.LongCatImageEditPipeline`; without a reference, `diffusers.LongCatImagePipeline`. The pipeline draws
at the size it brings its reference to, so a reference is always seen at the size of the target. Positions of pictures
begin behind the text; target and reference lie on each other there and differ in the first coordinate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    ModelMixin,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image as drawing
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as editing
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import (
    Asked,
    Published,
    Reference,
    References,
    Room,
    covering,
    plain_tokens,
    quiet,
    replaced,
)
from qwen_image_finetune.families.flux_kontext import FluxKontext, authors_names, tiny_scheduler, tiny_vae
from qwen_image_finetune.families.packing import concatenate_tokens, unpack
from qwen_image_finetune.families.qwen_image_edit import SEEN_SIDE, sliver_fault
from qwen_image_finetune.lora.readers import EVERYTHING, Reader
from qwen_image_finetune.records import Batch, Extent

MODEL_AREA = 1024 * 1024
MAX_PROMPT_TOKENS = 512
TEXT, TARGET, REFERENCE = 0, 1, 2  # first coordinates
APOSTROPHE = "\ue000"  # for one inside a word; a character that no text has

split_quotation = editing.split_quotation


class LongCatImageEdit(FluxKontext):
    """LongCat-Image-Edit: one reference. Latents, their packing and guidance are those of FLUX.1 Kontext."""

    name = "LongCatImageEdit"
    pipeline = LongCatImageEditPipeline
    transformer = LongCatImageTransformer2DModel
    text_components = ("text_encoder", "tokenizer", "text_processor")
    always_loaded = ("text_processor",)
    text_embeddings = ("prompt_embeds",)
    prompt_tokenizer = "tokenizer"
    text_sees_references = True
    max_references = 1
    references_follow = True
    num_inference_steps = 50
    guidance_scale = 4.5
    negative_prompt = ""
    lora_names: ClassVar = {
        name: replace(known, modules=tuple(one.replace("time_text_embed", "time_embed") for one in known.modules))
        for name, known in authors_names().items()
        if not name.startswith(("vector_in", "guidance_in"))
    }
    # Of ComfyUI since it knows the model, by its map for FLUX.1, which calls the timestep's embedder otherwise;
    # diffusers has no loader of LoRA files for this pipeline.
    lora_readers = (
        Reader("ComfyUI", "diffusers", r"time_embed\..*"), Reader("ComfyUI", "comfy"), Reader("ComfyUI", "kohya"),
        *(Reader("diffusers", dialect, EVERYTHING) for dialect in ("diffusers", "comfy", "kohya")),
    )  # fmt: skip
    published: ClassVar[tuple[Published, ...]] = (
        Published(
            "meituan-longcat/LongCat-Image-Edit", 8.38e9, "Apache 2.0", {"num_layers": 10, "num_single_layers": 20}
        ),
    )

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """The aspect ratio kept at `area` (the model's: 1024 x 1024), sides up to multiples of 16."""
        width, height = editing.calculate_dimensions(area or MODEL_AREA, width / height)
        return width, height

    def scaled(self, picture: Extent, size: Extent, area: int | None = None, references: int = 1) -> Extent:
        """As the pipeline does, to `size` itself where rounding alone makes it of another ratio than the picture.

        Else the picture covers `size`; the pipeline draws no such sizes.
        """
        return size if self._keeps_ratio(picture, size) else covering(picture, size)

    def _keeps_ratio(self, picture: Extent, size: Extent) -> bool:
        """Whether there is an area at which a picture has this size."""
        sides = list(zip(picture, size, strict=True))
        return max((side - self.side_multiple) / own for own, side in sides) < min(side / own for own, side in sides)

    def _fitted(self, pipe: DiffusionPipeline, picture: Image, size: Extent) -> Image:
        """A reference as the VAE sees it; see `scaled`."""
        mode = "default" if self._keeps_ratio(picture.size, size) else "crop"
        fitted: Image = pipe.image_processor.resize(picture, size[1], size[0], resize_mode=mode)
        return fitted

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """Last hidden states (T, D): of the picture, then of 512 tokens, of which padding is not masked.

        The language model sees the reference at half the size at which the VAE sees it, made from that one. Without a
        reference the prompt goes through the text-to-image template, on which the base model was trained. A checkpoint
        whose tokenizer says that its prompts are shorter gets what it says.
        """
        parts = {name: pipe.components[name] for name in self.text_components}
        reads: type[DiffusionPipeline] = LongCatImageEditPipeline if references else LongCatImagePipeline
        # Of the text encoder's parts alone: such a pipeline is where its text encoder is.
        reader = reads(scheduler=None, vae=None, transformer=None, **parts)
        reader.tokenizer_max_length = prompt_length(pipe)
        seen = {}
        for picture, size in references:
            seen["image"] = pipe.image_processor.resize(self._fitted(pipe, picture, size), *self.seen(size)[::-1])
        with quiet("transformers.tokenization_utils_base"), apostrophes_kept():
            embeds, _ = reader.encode_prompt([prompt], **seen)
        return {"prompt_embeds": embeds[0]}

    def seen(self, size: Extent) -> Extent:
        """(width, height) at which the language model sees a reference that the VAE sees at `size`."""
        return size[0] // 2, size[1] // 2

    def reference_fault(self, picture: Extent, size: Extent) -> str | None:
        """The picture processor of the language model refuses slivers."""
        return sliver_fault(picture, self.seen(size))

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room:
        """What both pipelines read. That for editing fails on more, that without a reference cuts."""
        return Room(prompt_length(pipe), cut=not references)

    def prompt_tokens(self, pipe: DiffusionPipeline, prompt: str) -> list[int]:
        """What stands in quotation marks is read letter by letter."""
        words = [letters for part, quoted in parts_of(prompt) for letters in (part if quoted else [part])]
        return [token for word in words for token in plain_tokens(pipe.tokenizer, word)]

    def text_tokens(self, references: Sequence[Extent]) -> int:
        """Padding is part of the text, and the language model sees the reference."""
        seen = [self.seen(size) for size in references]
        return MAX_PROMPT_TOKENS + sum(round(width / SEEN_SIDE) * round(height / SEEN_SIDE) for width, height in seen)

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        text = batch.text["prompt_embeds"]
        length = text.shape[1]

        def ids(kind: int, latent: Tensor) -> Tensor:
            rows, columns = latent.shape[-2] // 2, latent.shape[-1] // 2
            found: Tensor = editing.prepare_pos_ids(kind, "image", (length, length), height=rows, width=columns)
            return found

        places = [ids(TARGET, noisy), *(ids(REFERENCE, reference).double() for reference in batch.references)]
        predicted: Tensor = transformer(
            hidden_states=concatenate_tokens(noisy, batch.references),
            timestep=timestep,
            encoder_hidden_states=text,
            txt_ids=editing.prepare_pos_ids(TEXT, "text", num_token=length).to(noisy.device),
            img_ids=torch.cat(places).to(noisy.device),
            return_dict=False,
        )[0]
        return unpack(predicted[:, : self.tokens(noisy.shape)], height, width)

    def distilled_guidance(self, transformer_config: Mapping[str, Any]) -> bool:
        return False

    def tiny(self, folder: Path) -> None:
        """2 double and 2 single blocks, a Qwen2.5-VL that sees pictures, latents 16 x f8."""
        from qwen_image_finetune.families import tiny

        tiny.write_once(folder, {"pipeline": self.pipeline.__name__}, tiny_pipeline)

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        """Without a reference: no rewriting of the prompt, and guidance as in editing, which does not renormalise."""
        options = {**asked.options, "guidance_scale": asked.guidance}
        if asked.references:
            (reference,) = asked.references
            if not self._keeps_ratio(reference.size, asked.size):  # the pipeline draws at the ratio of its reference
                reference = self._fitted(pipe, reference, asked.size)
            options["image"] = reference
            del options["width"], options["height"]
        else:
            pipe = LongCatImagePipeline(**pipe.components)
            pipe.set_progress_bar_config(disable=True)
            options |= dict(enable_prompt_rewrite=False, enable_cfg_renorm=False)
        pipe.tokenizer_max_length = prompt_length(pipe)  # of the full-size checkpoint: the pipeline's own, 512
        with replaced(editing, "calculate_dimensions", lambda *_: asked.size):
            drawn: Image = pipe(**options).images[0]
        return drawn


def prompt_length(pipe: DiffusionPipeline) -> int:
    """Tokens of a prompt, padding included."""
    return min(MAX_PROMPT_TOKENS, int(pipe.tokenizer.model_max_length))


def parts_of(prompt: str, pairs: Any = None) -> list[tuple[str, bool]]:
    """The pipelines' `split_quotation`: parts of a prompt, and whether they stand in quotation marks.

    Theirs hides words with an apostrophe ("don't") from the marks, but with two of them it puts one in the place of the
    other, and which one differs from process to process. Here every word stays what it is.
    """
    hidden = re.sub(r"(?<=[a-zA-Z])'(?=[a-zA-Z])", APOSTROPHE, prompt)
    return [(part.replace(APOSTROPHE, "'"), quoted) for part, quoted in split_quotation(hidden, pairs)]


@contextmanager
def apostrophes_kept() -> Iterator[None]:
    """Around the pipelines' tokenising; see `parts_of`."""
    with replaced(editing, "split_quotation", parts_of), replaced(drawing, "split_quotation", parts_of):
        yield


def tiny_pipeline() -> LongCatImageEditPipeline:
    """The pipeline that `LongCatImageEdit.tiny` writes."""
    from qwen_image_finetune.families import tiny
    from qwen_image_finetune.families.tiny_tokenizers import MAX_T5_TOKENS

    transformer = LongCatImageTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        joint_attention_dim=tiny.WIDTH,
        pooled_projection_dim=tiny.WIDTH,
        axes_dims_rope=list(tiny.ROPE),
    )
    text = tiny.qwen_text()
    text["tokenizer"].model_max_length = MAX_T5_TOKENS  # padding, too, is read
    text["text_processor"] = text.pop("processor")
    return LongCatImageEditPipeline(
        scheduler=tiny_scheduler(),
        vae=tiny_vae(),
        **text,
        transformer=tiny.sharpen(tiny.randomise(transformer, seed=4)),
    )
