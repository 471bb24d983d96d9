"""Classes that a configuration names by their import path."""

from __future__ import annotations

import difflib
import importlib

from qwen_image_finetune.config.values import ConfigError

EXTRAS = {  # package: extra of ours that brings it
    "bitsandbytes": "bitsandbytes", "prodigyopt": "prodigy", "pytorch_optimizer": "optimizers",
    "schedulefree": "optimizers",
}  # fmt: skip


def import_class(dotted: str, key: str, base: type) -> type:
    """The class at the import path `dotted`, which `key` gave; it must be derived from `base`.

    Only the module that `dotted` names is imported, and nothing in it is called.

    Raises:
        ConfigError: no such module or class, or a class that is not derived from `base`.
    """
    module_name, _, name = dotted.rpartition(".")
    wanted = f"{key} takes a subclass of {base.__module__}.{base.__qualname__}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = (error.name or module_name).partition(".")[0]
        if package != module_name.partition(".")[0]:
            raise ConfigError(
                f"{key}={dotted!r}: importing {module_name} needs {package}, not installed here"
            ) from error
        if package in EXTRAS:
            hint = f"{package} is not installed: pip install 'qwen-image-finetune[{EXTRAS[package]}]'"
        else:
            hint = f"there is no module {error.name}; {wanted}"
        raise ConfigError(f"{key}={dotted!r}: {hint}") from error
    except ImportError as error:
        raise ConfigError(f"{key}={dotted!r}: importing {module_name} fails: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        classes = [each for each, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        there = {each.lower(): each for each in classes}
        close = difflib.get_close_matches(name.lower(), there, n=1)
        question = f"; did you mean {there[close[0]]}?" if close else ""
        raise ConfigError(f"{key}={dotted!r}: {module_name} has no {name}; {wanted}{question}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key}={dotted!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found
