"""Tiny tokenizers of the real classes, learned from a few sentences in a moment and equal on every call.

The vocabularies are small, but the words of the prompt templates are whole tokens, as in the real ones: the template of
Qwen-Image-Edit is 64 tokens long and that of Qwen-Image 34, which their pipelines have as constants.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

# In the order of their ids in the real tokenizer.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
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

MAX_T5_TOKENS = 64  # 512 in the full-size checkpoint: a tiny model would spend nearly all its time on padding


def qwen_tokenizer(sentences: Sequence[str] = SENTENCES) -> Qwen2Tokenizer:
    """Byte-level BPE of a few hundred tokens, special tokens last."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(tuple(word) for word in _words(Qwen2Tokenizer(), sentences))
    tokenizer = Qwen2Tokenizer(vocab=_vocabulary(letters, merges), merges=merges)  # <|endoftext|> takes the next id
    tokenizer.add_tokens(list(QWEN_SPECIAL_TOKENS[1:]), special_tokens=True)
    # Not an argument of the constructor: it would take the id after <|endoftext|> and shift the others.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.model_max_length = 131072
    return tokenizer


def clip_tokenizer(sentences: Sequence[str] = SENTENCES) -> CLIPTokenizer:
    """Lower-case BPE whose words end in "</w>", 77 tokens a prompt; ids of the two special tokens come last."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges((*word[:-1], f"{word[-1]}</w>") for word in _words(CLIPTokenizer(), sentences))
    vocabulary = _vocabulary([*letters, *(f"{letter}</w>" for letter in letters)], merges)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def t5_tokenizer(sentences: Sequence[str] = SENTENCES, max_tokens: int = MAX_T5_TOKENS) -> T5Tokenizer:
    """Unigram model of the sentences' words and of single characters, with T5's 100 sentinels at the end."""
    words = Counter(word for sentence in sentences for word in re.findall(r"\w+", sentence))
    total = sum(words.values())
    pieces = {f"▁{word}": math.log(count / total) for word, count in sorted(words.items())}
    pieces["▁"] = -5.0
    for character in string.ascii_letters + string.digits + string.punctuation:
        pieces.setdefault(character, -10.0)
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5Tokenizer(vocab=[*special, *pieces.items(), *sentinels], extra_ids=100, model_max_length=max_tokens)


def _words(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> list[str]:
    """The sentences split into words as the tokenizer does before it applies BPE, bytes written as letters."""
    backend = tokenizer.backend_tokenizer
    normal = (backend.normalizer.normalize_str(sentence) for sentence in sentences)
    return [word for sentence in normal for word, _ in backend.pre_tokenizer.pre_tokenize_str(sentence)]


def _merges(words: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Byte-pair encoding: join the most frequent pair of neighbours until each word is one token.

    Written out because the library's trainer breaks ties by the order of a hash table, another one in every process.
    """
    counts = Counter(words)
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in counts.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            return merges
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        joined: Counter[tuple[str, ...]] = Counter()
        for word, count in counts.items():
            joined[_join(word, merges[-1])] += count
        counts = joined


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`word` with every occurrence of `pair` made one token, from left to right."""
    tokens: list[str] = []
    position = 0
    while position < len(word):
        found = word[position : position + 2] == pair
        tokens.append("".join(pair) if found else word[position])
        position += 2 if found else 1
    return tuple(tokens)


def _vocabulary(letters: Iterable[str], merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Token to id: single letters, then what the merges make of them in their order."""
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    return {token: index for index, token in enumerate(tokens)}
