"""Tiny random checkpoints of the real architectures, in diffusers layout, for tests and the demo.

They have every component, config key and special case of the published checkpoints and none of their size: 1 to 2.5 M
parameters. Schedulers and the normalisation of the latents carry the published numbers unchanged. The weights are drawn
so that activations keep their variance from layer to layer: text, references, timestep and guidance all visibly reach
the output, unlike with the small random weights most constructors leave behind.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from qwen_image_finetune.disk.files import open_to_umask
from qwen_image_finetune.families.tiny_tokenizers import (
    MAX_T5_TOKENS,
    SENTENCES,
    clip_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
)

Model = TypeVar("Model", bound=nn.Module)

VERSION = 2  # raise it whenever the bytes written below change
MARKER = "tiny.json"  # written last into a checkpoint: says which function and version made it
WIDTH = 64  # of the text encoders that feed the transformers
HEADS, HEAD_DIM = 4, 32  # of the transformers
ROPE = (8, 12, 12)  # of HEAD_DIM: frame, row, column; the real proportions are 16 : 56 : 56


def tiny_flux_kontext(folder: Path) -> None:
    """Write a FLUX.1 Kontext checkpoint with guidance embedding: 2 double and 2 single blocks, latents 16 x f8.

    Raises:
        FileExistsError: `folder` holds something that was not written by this module.
    """
    _write_once(Path(folder), {"pipeline": "FluxKontextPipeline"}, _flux_kontext)


def tiny_qwen_image_edit(
    folder: Path, cls: type[DiffusionPipeline] = QwenImageEditPipeline, zero_cond_t: bool = False
) -> None:
    """Write a Qwen-Image-Edit checkpoint: 3 blocks, a Qwen2.5-VL that sees pictures, latents 16 x f8.

    Args:
        cls: `QwenImageEditPipeline` or a pipeline of the same components, such as `QwenImageEditPlusPipeline`.
        zero_cond_t: modulate reference tokens at t = 0, as the 2511 checkpoint does.

    Raises:
        FileExistsError: `folder` holds something that was not written by this module.
    """
    identity = {"pipeline": cls.__name__, "zero_cond_t": zero_cond_t}
    _write_once(Path(folder), identity, lambda: _qwen_image_edit(cls, zero_cond_t))


# Pipelines


def flux_text(sentences: Sequence[str] = SENTENCES, max_t5_tokens: int = MAX_T5_TOKENS) -> dict[str, Any]:
    """Tokenizers that know the words of `sentences`, and text encoders that are random but tell them apart."""
    clip, t5 = clip_tokenizer(sentences), t5_tokenizer(sentences, max_t5_tokens)
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return {
        "text_encoder": _randomise(CLIPTextModel(clip_config), seed=2),
        "tokenizer": clip,
        "text_encoder_2": _randomise(T5EncoderModel(t5_config), seed=3),
        "tokenizer_2": t5,
    }


def _flux_kontext() -> DiffusionPipeline:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=1024,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _amplify(_randomise(vae, seed=1).encoder.conv_out, rows=vae.config.latent_channels, factor=5.0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae,
        **flux_text(),
        transformer=_sharpen(_randomise(transformer, seed=4)),
    )


def qwen_text(sentences: Sequence[str] = SENTENCES) -> dict[str, Any]:
    """The same for the model that reads prompt and references together."""
    tokenizer = qwen_tokenizer(sentences)
    return {
        "text_encoder": _randomise(_qwen_vl(tokenizer), seed=2),
        "tokenizer": tokenizer,
        "processor": _qwen_vl_processor(tokenizer),
    }


def _qwen_image_edit(cls: type[DiffusionPipeline], zero_cond_t: bool) -> DiffusionPipeline:
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)  # the defaults hold the published mean and std
    _amplify(_randomise(vae, seed=1).quant_conv, rows=vae.config.z_dim, factor=4.0)
    _amplify(vae.decoder.conv_out, rows=3, factor=2.0)
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE,
        zero_cond_t=zero_cond_t,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    return cls(
        scheduler=scheduler,
        vae=vae,
        **qwen_text(),
        transformer=_sharpen(_randomise(transformer, seed=3)),
    )


def _qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The model that reads prompt and references: 2 language and 2 vision layers."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_vl_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Processor that shows the model between 4 and 128 image tokens (each 28 x 28 pixels) of a picture."""
    images = Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=128 * 28 * 28)
    return Qwen2VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor())


# Weights


def _randomise(model: Model, seed: int) -> Model:
    """Draw every parameter of `model` anew, from a generator of its own.

    Matrices and kernels keep the variance of what they multiply, norms keep their gain of one, biases become small but
    not zero (a bias that is forgotten somewhere should show).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == 1).all()):
                continue
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            std = 1 / math.sqrt(fan_in) if parameter.ndim > 1 else 0.05
            parameter.normal_(0, std, generator=generator)
    return model.eval()


def _amplify(layer: nn.Module, rows: int, factor: float) -> None:
    """Scale the first `rows` outputs of a linear or convolution.

    The factors above were measured: normalised latents of a picture come out near unit variance (the first half of an
    encoder's outputs is the mean, the second the log-variance), decoded pictures spread over the range of values.
    """
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[:rows] *= factor


def _sharpen(transformer: Model) -> Model:
    """Make attention pick tokens out: with gains of one it averages over all of them, and a reference hardly counts."""
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.split(".")[-2] in names:
                parameter.fill_(2.0)
    return transformer


# Files


def _write_once(folder: Path, identity: dict[str, Any], build: Callable[[], DiffusionPipeline]) -> None:
    """Save what `build` makes as `folder`, whole or not at all; nothing to do where it already stands."""
    marker = {"version": VERSION, **identity}
    found = _read_marker(folder)
    if found == marker:
        return
    if found is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files that are no tiny checkpoint: give an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):  # constructors draw weights that are thrown away
            build().save_pretrained(temporary / "new", safe_serialization=True)
        (temporary / "new" / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        open_to_umask(temporary / "new")
        if found is not None:
            os.rename(folder, temporary / "old")
        try:
            os.rename(temporary / "new", folder)
        except OSError:
            if _read_marker(folder) != marker:  # otherwise another process was faster and wrote the same
                raise
    finally:
        shutil.rmtree(temporary)


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """What `_write_once` left in `folder`, None where it wrote nothing."""
    file = folder / MARKER
    if not file.is_file():
        return None
    marker: dict[str, Any] = json.loads(file.read_text())
    return marker
