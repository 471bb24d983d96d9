"""Tiny tokenizers of the real classes, learned from a few sentences in a moment and equal on every call.

The vocabularies are small, but the words of the pipelines' own prompt templates are whole tokens, as they are in the real
ones: the template of Qwen-Image-Edit is 64 tokens long and that of Qwen-Image 34, which their pipelines have as constants.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

# In the order of their ids in the real tokenizer.
QWEN_SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
        "vision_start vision_end vision_pad image_pad video_pad"
    ).split()
)

# System prompts of `QwenImageEditPipeline` and `QwenImagePipeline`, then sentences an editor might be given.
SENTENCES = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.",
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:",
    "user\n",
    "assistant\n",
    "Picture 1: Picture 2: Picture 3: Picture 4:",
    "draw the segmentation mask of this face",
    "draw the segmentation map of the face in this picture, one flat color for each part",
    "segment this face: hair, skin, eyes, mouth, hat and glasses",
    "turn the photo into a pencil sketch",
    "make the background red, green, blue, yellow, black or white",
    "add a hat to the person; remove the glasses from the woman; change the hair of the man",
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE of about a thousand tokens, special tokens last."""
    template = Qwen2Tokenizer()._tokenizer  # for the real normaliser and word splitter
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    vocabulary, merges = _learn_bpe(learner, vocab_size=1024)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)  # gives <|endoftext|> the first free id
    tokenizer.add_tokens(list(QWEN_SPECIAL_TOKENS[1:]), special_tokens=True)
    # Not an argument of the constructor: it would take the id after <|endoftext|> and shift the others.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.model_max_length = 131072
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """Lower-case BPE with word ends, at most 77 tokens a prompt; ids of the two special tokens come last."""
    template = CLIPTokenizer()._tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    vocabulary, merges = _learn_bpe(learner, vocab_size=800, end_of_word_suffix="</w>")
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # every byte can also end a word
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram model of the sentences' words and of single characters, with T5's 100 sentinels at the end.

    The words are counted here because the library's trainer of unigram models is not reproducible to the last bit.
    """
    words = Counter(word for sentence in SENTENCES for word in re.findall(r"\w+", sentence))
    total = sum(words.values())
    pieces = {f"▁{word}": math.log(count / total) for word, count in sorted(words.items())}
    pieces["▁"] = -5.0
    for character in string.ascii_letters + string.digits + string.punctuation:
        pieces.setdefault(character, -10.0)
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5Tokenizer(vocab=[*special, *pieces.items(), *sentinels], extra_ids=100, model_max_length=512)


def _learn_bpe(
    learner: Tokenizer, vocab_size: int, end_of_word_suffix: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that `learner` finds in the sentences."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=end_of_word_suffix,
        show_progress=False,
    )
    learner.train_from_iterator(SENTENCES, trainer)
    model = json.loads(learner.to_str())["model"]
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]]
