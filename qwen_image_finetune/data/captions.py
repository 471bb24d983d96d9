"""The prompts of a row: those of its table, or of its caption file."""

from __future__ import annotations

from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.listing import LONGEST_CAPTION, Row


def prompts_of(row: Row) -> tuple[str, ...]:
    """All prompts of a row, one or more, after the prefix of its data set.

    Without byte order mark and surrounding white space, lines ended by a line feed.

    Raises:
        DataError: the file is gone or not UTF-8.
    """
    given = (_read(row),) if row.prompt is None else (row.prompt, *row.more_prompts)
    texts = [text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in given]
    if row.shared.per_line:
        texts = [line.strip() for text in texts for line in text.split("\n") if line.strip()] or [""]
    return tuple((row.shared.prefix + text).strip() for text in texts)


def has_several(row: Row) -> bool:
    """Whether a row may have more than one prompt."""
    return bool(row.more_prompts) or row.shared.per_line


def _read(row: Row) -> str:
    assert row.caption is not None
    try:
        if (size := row.caption.stat().st_size) > LONGEST_CAPTION:
            raise DataError(f"{row.caption}: {size} bytes; a caption has at most {LONGEST_CAPTION}")
        return row.caption.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{row.caption}: not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{row.caption}: cannot be read ({error})") from error
