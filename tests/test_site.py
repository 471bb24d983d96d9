"""The documentation as a site: every page is in it, and a link that leads nowhere fails it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
COPIED = ("docs", "notebooks", "toy/README.md", "scripts/build_docs.py", "mkdocs.yml", "README.md", "CONTRIBUTING.md",
          "CHANGELOG.md")  # fmt: skip


def build(copy: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, copy / "scripts/build_docs.py"], capture_output=True, text=True, check=False)


def test_the_site(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for name in COPIED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    done = build(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {file.stem for file in (copy / "docs").glob("*.md")}
    listed = set(re.findall(r"docs/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == pages  # none is left out of the contents
    for page in pages:
        assert (copy / f"build/site/docs/{page}.html").is_file() or (
            copy / f"build/site/docs/{page}/index.html"
        ).is_file()
    assert (copy / "build/site/docs/studio.png").is_file()
    index = next((copy / "build/site/search").glob("search_index.js*")).read_text()
    assert "blocks_to_swap" in index
    start = (copy / "build/site/index.html").read_text()
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk|www\.mkdocs|zensical)[^"]*\.(?:js|css|woff2?)"', start)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False

    (copy / "docs/recipe.md").write_text("# A recipe\n\n[nowhere](nowhere.md)\n")
    broken = build(copy)
    assert broken.returncode != 0 and "nowhere.md" in broken.stdout + broken.stderr
