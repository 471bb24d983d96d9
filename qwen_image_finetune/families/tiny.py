"""What the tiny checkpoints of the families share: `Family.tiny` writes random ones of the real architecture.

They have every component, config key and special case of the published checkpoints and none of their size: 1 to 2.5 M
parameters. Schedulers and the normalisation of the latents carry the published numbers unchanged. The weights are drawn
so that activations keep their variance from layer to layer: text, references, timestep and guidance all visibly reach
the output, unlike with the small random weights most constructors leave behind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
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
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from qwen_image_finetune.disk.files import staged_folder
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
CHAT_TEMPLATE = (  # as much of Qwen3-VL's as a system message takes
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
ROPE = (8, 12, 12)  # of HEAD_DIM: frame, row, column; the real proportions are 16 : 56 : 56


class OccupiedError(FileExistsError):
    """A folder that a checkpoint would be written over."""


# Text encoders


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
        "text_encoder": randomise(CLIPTextModel(clip_config), seed=2),
        "tokenizer": clip,
        "text_encoder_2": randomise(T5EncoderModel(t5_config), seed=3),
        "tokenizer_2": t5,
    }


def qwen_text(sentences: Sequence[str] = SENTENCES) -> dict[str, Any]:
    """The same for the model that reads prompt and references together."""
    tokenizer = qwen_tokenizer(sentences)
    return {
        "text_encoder": randomise(_qwen_vl(tokenizer), seed=2),
        "tokenizer": tokenizer,
        "processor": _qwen_vl_processor(tokenizer),
    }


def _qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The model that reads prompt and references: 2 language and 2 vision layers."""
    parts = _vision_language(tokenizer, mrope_section=[4, 6, 6], rope_theta=1e6)
    parts["vision_config"] |= {"fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**parts))


def _vision_language(tokenizer: Qwen2Tokenizer, **rope: Any) -> dict[str, Any]:
    """What the configurations of Qwen's models of words and pictures have in common.

    Args:
        rope: of the language model's positions.
    """
    ids = tokenizer.convert_tokens_to_ids
    return {
        "text_config": {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", **rope},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
        **{f"{kind}_token_id": ids(f"<|{kind}_pad|>") for kind in ("image", "video")},
        **{f"vision_{edge}_token_id": ids(f"<|vision_{edge}|>") for edge in ("start", "end")},
        "tie_word_embeddings": True,
    }


def _qwen_vl_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Processor that shows the model between 4 and 128 image tokens (each 28 x 28 pixels) of a picture."""
    images = Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=128 * 28 * 28)
    return Qwen2VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor())


def qwen3_text(
    sentences: Sequence[str] = SENTENCES, chat_template: str = CHAT_TEMPLATE, **language: Any
) -> dict[str, Any]:
    """The same with Qwen3-VL, whose tokens of a picture are 32 x 32 pixels, and whose processor has the tokenizer.

    Args:
        language: of its language model's configuration.
    """
    tokenizer = qwen_tokenizer(sentences)
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=128 * 32 * 32)
    processor = Qwen3VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=chat_template,
    )
    return {"text_encoder": randomise(_qwen3_vl(tokenizer, language), seed=2), "processor": processor}


def _qwen3_vl(tokenizer: Qwen2Tokenizer, language: Mapping[str, Any]) -> Qwen3VLForConditionalGeneration:
    """2 language and 2 vision layers, the first of which reaches into the language model."""
    parts = _vision_language(tokenizer, mrope_section=[6, 5, 5], rope_theta=5e6)
    parts["text_config"] |= {"head_dim": 32, **language}
    parts["vision_config"] |= {
        "out_hidden_size": parts["text_config"]["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**parts))


# Weights


def randomise(model: Model, seed: int) -> Model:
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


def amplify(layer: nn.Module, rows: int, factor: float) -> None:
    """Scale the first `rows` outputs of a linear or convolution.

    The factors in the files of the families were measured: normalised latents of a picture come out near unit variance
    (the first half of an encoder's outputs is the mean, the second the log-variance), decoded pictures spread over the
    range of values.
    """
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[:rows] *= factor


def film_vae(vae: Any) -> Any:
    """An autoencoder of films with random weights. Its class's defaults hold the published mean and deviation."""
    amplify(randomise(vae, seed=1).quant_conv, rows=vae.config.z_dim, factor=4.0)
    amplify(vae.decoder.conv_out, rows=3, factor=2.0)
    return vae


def sharpen(transformer: Model) -> Model:
    """Make attention pick tokens out: with gains of one it averages over all of them, and a reference hardly counts."""
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k",
             *(f"{stream}_attn_{part}_norm" for stream in ("img", "txt") for part in "qk"))  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.split(".")[-2] in names:
                parameter.fill_(2.0)
    return transformer


# Files


def write_once(folder: Path, identity: dict[str, Any], build: Callable[[], DiffusionPipeline]) -> None:
    """Save what `build` makes as `folder`, whole or not at all; nothing to do where it already stands.

    Raises:
        OccupiedError: `folder` holds something that was not written by this module.
    """
    marker = {"version": VERSION, **identity}
    found = _read_marker(folder)
    if found == marker:
        return
    if found is None and folder.exists() and any(folder.iterdir()):
        raise OccupiedError(f"{folder} holds files that are no tiny checkpoint: give an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged_folder(folder, sealed=False) as stage:
            with torch.random.fork_rng(devices=[]):  # constructors draw weights that are thrown away
                build().save_pretrained(stage, safe_serialization=True)
            (stage / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    except OSError:
        if _read_marker(folder) != marker:  # otherwise another process was faster and wrote the same
            raise


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """What `write_once` left in `folder`, None where it wrote nothing."""
    file = folder / MARKER
    if not file.is_file():
        return None
    marker: dict[str, Any] = json.loads(file.read_text())
    return marker
