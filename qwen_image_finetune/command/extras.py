"""Packages that a verb needs and that do not come with every installation."""

from __future__ import annotations

from importlib.util import find_spec


class MissingExtra(RuntimeError):
    """A verb whose packages are not installed, with the command that installs them."""


def need(extra: str, *packages: str) -> None:
    """Raises MissingExtra where one of the packages of an extra is not there."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"this needs {', '.join(missing)}, not installed here: pip install 'qwen-image-finetune[{extra}]'"
        )
