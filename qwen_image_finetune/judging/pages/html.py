"""The skeleton of a page, and the pieces it is put together from. Everything is inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_regular

__all__ = ["cards", "details", "document", "escape", "is_page", "picture", "section", "table"]

GENERATOR = '<meta name="generator" content="qwen-image-finetune">'
LARGEST = 1024 * MEBIBYTE
QUALITY = 88  # of JPEG


def document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The whole page.

    Args:
        title, subtitle: text.
        parts: HTML.
    """
    style, script = (
        "".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in names)
        for names in (("look.css", "page.css"), ("charts.js", "page.js"))
    )
    # The policy makes a browser refuse whatever is not in the file, should a piece of it ever ask for more.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{GENERATOR}\n"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n<main>\n{body}\n</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def is_page(path: Path) -> bool:
    """Whether `document` made a file."""
    try:
        return GENERATOR.encode() in read_regular(path, LARGEST)[:1024]
    except (OSError, Unreadable):
        return False


def section(name: str, title: str, body: str) -> str:
    """A part of the page with a heading, `name` being its anchor."""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>\n{body}\n</section>'


def cards(values: Sequence[tuple[str, str]]) -> str:
    """A few numbers that matter most, each with its name."""
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values)
    return f'<dl class="cards">{inner}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Sequence[int] = ()) -> str:
    """Text in rows and columns; on a narrow screen each row becomes a block, each cell with the head of its column.

    Args:
        marked: numbers of the rows that stand out.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for number, row in enumerate(rows):
        first, *rest = row
        cells = f'<th scope="row">{escape(first)}</th>' + "".join(
            f'<td data-head="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(head[1:], rest, strict=True)
        )
        lines.append(f"<tr{' class=marked' if number in marked else ''}>{cells}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(summary: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def picture(image: Image.Image, alternative: str, height: int, attributes: str = "") -> str:
    """An <img> with its pixels inside, at most `height` high.

    Args:
        attributes: HTML of further attributes.
    """
    if image.height > height:
        size = (max(round(image.width * height / image.height), 1), height)
        image = image.resize(size, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=QUALITY, subsampling=0)
    data = base64.b64encode(content.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alternative)}" width="{image.width}" '
        f'height="{image.height}"{" " * bool(attributes)}{attributes}>'
    )
