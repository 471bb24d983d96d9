"""JoyAI-Image-Edit: the model of JoyAI-Image-Edit-Plus for one reference, which is brought to the size of the target.

Oracle: `diffusers.JoyImageEditPipeline`, which draws from the prompt alone too. Reference and target are items of one
tensor, the target last. The pipeline draws the latents of its reference at random from the autoencoder's posterior and
takes no seed for it. Here they are the middle of the posterior, as in every family; the oracle is called with that in
place of the draw. It decodes reference and target together; as a batch of two adds up in another order, it is told to
decode one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, JoyImageEditPipeline, JoyImageEditTransformer3DModel, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.joyimage import image_processor as processing
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import Asked, Published, Reference, References, Room, replaced
from qwen_image_finetune.families.joy_image_edit_plus import LONGEST_TEXT, PUBLISHED, JoyImageEditPlus
from qwen_image_finetune.families.packing import one_by_one
from qwen_image_finetune.records import Batch, Extent


class JoyImageEdit(JoyImageEditPlus):
    """JoyAI-Image-Edit: one reference."""

    name = "JoyImageEdit"
    pipeline = JoyImageEditPipeline
    transformer = JoyImageEditTransformer3DModel
    max_references = 1
    references_follow = True
    num_inference_steps = 40
    guides_in_one_pass = False
    negative_prompt = ""
    published: ClassVar[tuple[Published, ...]] = (
        Published("jdopensource/JoyAI-Image-Edit-Diffusers", 8.9e9, "Apache 2.0", PUBLISHED),
    )

    def pixels(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """A film of one frame, (1, 3, 1, H, W), in the arithmetic of the pipeline."""
        values = torch.from_numpy(np.array(image)).to(pipe.vae.device, pipe.vae.dtype)
        return (values / 127.5 - 1.0).permute(2, 0, 1)[None, :, None]

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """States (T, D) of the language model's last layer, before its last norm, behind the system text.

        It sees the reference as the VAE does, before the prompt.
        """
        device = pipe.text_encoder.device
        if not references:
            embeds, _ = pipe.encode_prompt(prompt, device=device, max_sequence_length=LONGEST_TEXT)
            return {"prompt_embeds": embeds[0]}
        ((picture, size),) = references
        seen = pipe.vae_image_processor.resize_center_crop(picture, size[::-1])
        embeds, _ = pipe.encode_prompt_multiple_images(
            prompt, images=seen, device=device, max_sequence_length=LONGEST_TEXT
        )
        return {"prompt_embeds": embeds[0]}

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room | None:
        """Without a reference the pipeline cuts."""
        return None if references else Room(pipe.text_token_max_length, cut=True)

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        """One row after the other: the transformer has no mask for the padding of a text."""
        rows = [
            transformer(
                hidden_states=torch.stack([*alone.references, latents], dim=1).unsqueeze(3),
                timestep=level * 1000,
                encoder_hidden_states=alone.text["prompt_embeds"],
                return_dict=False,
            )[0][:, -1, :, 0]
            for latents, level, alone in one_by_one(noisy, timestep, batch)
        ]
        return torch.cat(rows)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guidance whose latents keep the norm over channels of the conditional prediction."""
        combined = unconditional + scale * (conditional - unconditional)
        norms = [torch.norm(one, dim=1, keepdim=True) for one in (conditional, combined)]
        return combined * (norms[0] / norms[1].clamp_min(1e-6))

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        middle = DiagonalGaussianDistribution.mode
        pipe.vae.enable_slicing()
        with (
            replaced(processing, "find_best_bucket", lambda *_: asked.size[::-1]),
            replaced(DiagonalGaussianDistribution, "sample", middle),
        ):
            drawn: Image = pipe(
                image=asked.references[0] if asked.references else None, **asked.options, guidance_scale=asked.guidance
            ).images[0]
        return drawn
