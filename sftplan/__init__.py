"""sftplan plans, verifies and launches the supervised fine-tuning of a language model.

    plan = sftplan.plan(model="gpt2-large", seq_len=1024, hardware="h200-sxm")

`plan`, `compare`, `verify` and `launch` take the options of the commands, with `_` for `-`. They
are looked up when they are used: importing sftplan costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftplan.api import compare as compare
    from sftplan.api import launch as launch
    from sftplan.api import plan as plan
    from sftplan.api import verify as verify

__version__ = "0.1.0"

_FUNCTIONS = ("plan", "compare", "verify", "launch")


class _CallableModule(ModuleType):
    """A subpackage that shares its name with a function of the API, and is called as it."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = self.__name__.removeprefix("sftplan.")
        return getattr(importlib.import_module("sftplan.api"), function)(*args, **options)


def make_callable(module_name: str) -> None:
    """Let the subpackage `module_name` be called as the function of the API that it shadows."""
    sys.modules[module_name].__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        message = f"module 'sftplan' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module("sftplan.api"), name)
