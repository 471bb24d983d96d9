"""The documentation as one site, in build/site: `make docs` runs it. A link that leads nowhere fails it.

    python scripts/build_docs.py [--serve]

The pages stay where a reader of the repository finds them. They are put into build/pages under the same paths, with the
pictures and files they link to, so that one link is right in both places.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "toy/README.md")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def gather(target: Path) -> list[Path]:
    """Copy every page and every file that a page links to; returns their paths in the repository."""
    shutil.rmtree(target, ignore_errors=True)
    pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    wanted = {*pages, *(file for page in pages for file in linked(page))}
    for file in wanted:
        copy = target / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return sorted(wanted)


def linked(page: Path) -> list[Path]:
    """The files of this repository that a page links to."""
    links = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    files = [(page.parent / link).resolve() for link in links if "://" not in link]
    return [file for file in files if file.is_file()]


def main() -> None:
    gather(ROOT / "build/pages")
    verb = "serve" if "--serve" in sys.argv[1:] else "build"
    command = [sys.executable, "-m", "mkdocs", verb, "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's word about its successor, at every build
    done = subprocess.run(command, cwd=ROOT, env=quiet, check=False)
    if done.returncode == 0 and verb == "build":
        print(f"open {ROOT / 'build/site/index.html'}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
