"""What keys may hold: the types of their values, and the section that they stand in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """A configuration that cannot be run, in words for the person who wrote it."""

    problems: tuple[str, ...] = ()  # one line each, where they were found one by one


@dataclass(frozen=True)
class Allowed:
    """What a type takes, in words: messages and the reference quote it."""

    words: str


def _whole(value: Any) -> Any:
    """YAML writes 1000.0 or 1e3 for a count; a bool is not one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def expression(key: str) -> AfterValidator:
    """Refuses, for `key`, a regular expression that does not compile (pydantic's own are of another dialect)."""

    def check(value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{key}={value!r} is not a regular expression: {error}") from error
        return value

    return AfterValidator(check)


def _readable(value: str) -> str:
    """Refuse what no path can be: a NUL, the home of nobody."""
    if "\0" in value:
        raise PydanticCustomError("path", "a NUL")
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError as error:
            raise PydanticCustomError("path", "no such home") from error
    return value


def refuse(problems: Sequence[str]) -> None:
    """Raise all problems as one ValueError, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


LARGEST = 10**9  # of what is counted: above it stand mistakes, and numbers that libraries cannot hold
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=LARGEST), Allowed("whole number from 1 to 10^9")]
Repeats = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10_000), Allowed("whole number from 1 to 10^4")]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=LARGEST), Allowed("whole number from 0 to 10^9")]
Rank = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=8192), Allowed("whole number from 1 to 8192")]
Side = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=65536), Allowed("whole number from 1 to 65536")]
Seconds = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**7), Allowed("whole number from 1 to 10^7")]
Shift = Annotated[float, Field(gt=0.0, le=1000.0), Allowed("number above 0, to 1000")]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63), Allowed("whole number from 0, below 2^63")]
Number = Annotated[float, Field(ge=-1e9, le=1e9), Allowed("number from -1e9 to 1e9")]
Rate = Annotated[float, Field(ge=0.0, le=1.0), Allowed("number from 0 to 1")]
Positive = Annotated[float, Field(gt=0.0, le=1e9), Allowed("number above 0, to 1e9")]
NotNegative = Annotated[float, Field(ge=0.0, le=1e9), Allowed("number from 0 to 1e9")]
Energy = Annotated[float, Field(gt=0.0, le=1.0), Allowed("number above 0, to 1")]
Strength = Annotated[float, Field(ge=-100.0, le=100.0), Allowed("number from -100 to 100")]
Switch = Annotated[bool, Allowed("true or false")]
Text = Annotated[str, Field(min_length=1), AfterValidator(_readable), Allowed("text")]
Device = Annotated[
    str, Field(pattern=r"^(cpu|mps|(cuda|xpu|npu)(:[0-9]+)?)$"), Allowed("cpu, cuda, cuda:N, mps, xpu[:N] or npu[:N]")
]
ClassPath = Annotated[
    str,
    Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+$"),
    Allowed("import path, package.module.Class"),
]
Identifier = Annotated[
    str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), Allowed("letters, digits and _, not a digit first")
]
FolderName = Annotated[
    str, Field(pattern=r"^\w[\w .-]*$"), Allowed("folder name: letters, digits, space, dot, _ and -; no slash")
]
Initialisation = Annotated[
    str,
    Field(pattern=r"^(gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]+)$"),
    Allowed('"gaussian", "orthogonal", "olora", "pissa" or "pissa_niter_N"'),
]
Size = Annotated[list[Side], Field(min_length=2, max_length=2), Allowed("[width, height]")]


class Section(BaseModel):
    """A part of the configuration: frozen, strict, no unknown keys, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
