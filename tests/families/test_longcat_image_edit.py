"""What LongCat-Image-Edit alone has: quoted words read letter by letter, and references at the size of the target."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import split_quotation

from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Reference, covering
from qwen_image_finetune.families.longcat_image_edit import LongCatImageEdit, parts_of
from tests.families.test_conditioning import picture

FAMILY = get_family("LongCatImageEdit")
assert isinstance(FAMILY, LongCatImageEdit)


@pytest.mark.parametrize(
    "prompt",
    ["", "a hat", "write 'Hello' on it", 'a "b c" d', "the woman's hat says 'it''s'", "‘x’ and “y”", "'unclosed",
     "don't 'quote' don't", "写“你好”"],
)  # fmt: skip
def test_quoted_parts_are_those_of_the_pipeline(prompt: str) -> None:
    assert parts_of(prompt) == split_quotation(prompt)


def test_words_with_an_apostrophe_stay_what_they_are() -> None:
    """The pipeline puts one of two such words in the place of the other."""
    prompt = "don't touch the woman's hat, write 'it is'"
    assert parts_of(prompt) == [("don't touch the woman's hat, write ", False), ("'it is'", True)]
    assert "".join(part for part, _ in split_quotation(prompt)) != prompt


def test_prompts_are_counted_as_the_pipeline_counts_them(tiny_checkpoints: dict[str, Path]) -> None:
    """One of as many tokens as there is room for is read, and the pipeline itself fails on the next."""
    pipe = FAMILY.pipeline.from_pretrained(tiny_checkpoints[FAMILY.name], transformer=None)
    references = [Reference(picture(64, 64), (64, 64))]
    room = FAMILY.room(pipe, (64, 64), [((64, 64), (64, 64))])
    quoted = "turn it 'into a sketch'"
    spare = room.tokens - len(FAMILY.prompt_tokens(pipe, quoted))
    fits = quoted + "!" * spare
    assert spare > 0 and len(FAMILY.prompt_tokens(pipe, fits)) == room.tokens
    assert len(FAMILY.prompt_tokens(pipe, quoted)) > len(FAMILY.prompt_tokens(pipe, quoted.replace("'", "`")))
    FAMILY.encode_text(pipe, fits, references)
    with pytest.raises(TypeError):
        FAMILY.encode_text(pipe, fits + "!", references)
    FAMILY.encode_text(pipe, fits + "!")  # without a reference the other pipeline cuts it


def test_a_reference_is_cropped_only_where_rounding_does_not_explain_the_size() -> None:
    for width, height in ((333, 777), (1000, 1000), (97, 1200), (4000, 3000)):
        for area in (None, 512 * 512, 128 * 96):
            size = FAMILY.size(width, height, area)
            assert FAMILY.scaled((width, height), size, area) == size
    assert FAMILY.scaled((400, 300), (512, 512)) == covering((400, 300), (512, 512)) == (682, 512)
