"""Open pages in headless Chromium as a phone and a desktop would, save what is seen, and fail on any console message.

python scripts/look_at_pages.py OUTPUT_FOLDER page.html [page.html ...]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
HEIGHT = 6000  # of the picture: a whole page at once
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Seen from inside a frame of the wanted width, because a window of Chromium is never narrower than 500 pixels. The
# frame is of the same origin, so that the outer page can say whether something sticks out sideways.
FRAME = """<!doctype html><meta charset="utf-8"><style>html, body {{ margin: 0 }} iframe {{ border: 0 }}</style>
<iframe src="{url}" width="{width}" height="{height}"></iframe>
<script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument.documentElement;
  const cut = [...inside.querySelectorAll("body *:not(.sides)")].filter(each =>
    each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX !== "visible");
  const names = [...new Set(cut.map(each => each.tagName.toLowerCase() + "." + each.className))].join(" ");
  document.title = "sideways " + (inside.scrollWidth - {width}) + " cut [" + names + "]";
}});
</script>"""


def chromium(url: str, *options: str) -> str:
    """Run it once with a profile of its own; returns what it printed."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--allow-file-access-from-files", "--hide-scrollbars",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--virtual-time-budget=3000",
            *options, url,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


def look(page: Path, folder: Path) -> list[str]:
    """Save a picture of the page at each size; returns what is wrong with it."""
    problems = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, _) in SIZES.items():
        frame = folder / f"{page.stem}-{name}.html"
        frame.write_text(FRAME.format(url=page.resolve().as_uri(), width=width, height=HEIGHT), encoding="utf-8")
        options = (f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={folder / f'{page.stem}-{name}.png'}")
        said = chromium(frame.resolve().as_uri(), *options, "--dump-dom")
        problems += [f"{page} ({name}): {line}" for line in re.findall(r".*CONSOLE.*", said)]
        seen = re.search(r"sideways (-?\d+) cut \[(.*?)\]", said)
        if seen is None:
            problems.append(f"{page} ({name}): did not load")
        elif int(seen[1]) > 0:
            problems.append(f"{page} ({name}): sticks out by {seen[1]} pixels at a width of {width}")
        if seen is not None and seen[2]:
            problems.append(f"{page} ({name}): cut off at a width of {width}: {seen[2]}")
        frame.unlink()
    return problems


def main() -> None:
    if CHROMIUM is None:
        sys.exit("chromium is not installed")
    folder, *pages = (Path(word) for word in sys.argv[1:])
    problems = [line for page in pages for line in look(page, folder)]
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
