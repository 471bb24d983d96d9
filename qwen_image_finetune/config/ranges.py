"""One check of a single value, for what is given outside a configuration: options of the command, Python arguments."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qwen_image_finetune.config.values import ConfigError
from qwen_image_finetune.config.words import allowed


def checked(kind: Any, value: Any, name: str) -> Any:
    """`value` as a key of the type `kind` would have it.

    Args:
        kind: one of the types of `config.values`, such as Seed.
        value: text is what was typed, as a number.
        name: of the argument, for the message.

    Raises:
        ConfigError: the value is not in the type's range; nan and inf never are.
    """
    adapter = TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        return adapter.validate_python(_number(value) if isinstance(value, str) else value)
    except ValidationError as error:
        raise ConfigError(f"{name}{value}: it must be a {allowed(kind)}") from error


def _number(text: str) -> int | float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
