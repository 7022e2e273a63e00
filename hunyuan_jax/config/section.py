"""`Section`: a config dataclass that checks its types and its rules when it is built."""

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
import typing
from typing import Any, ClassVar, Literal

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, LocalPath, user_path


class Section:
    """Base of the config dataclasses.

    Building one, by its class or by `dataclasses.replace`, raises ConfigError if a value has the
    wrong type or breaks a rule.  The string below a field is its meaning: `--help` prints it.
    """

    section: ClassVar[str]
    """Dotted name of the section in a run's config, such as "model.moe"."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = as_type(f"{self.section}.{name}".lstrip("."), getattr(self, name), hint)
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""


def require(is_ok: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `is_ok`."""
    if not is_ok:
        raise ConfigError(message)


def divisors(n: int) -> list[int]:
    """All divisors of n, for the remedy in a message."""
    return [d for d in range(1, n + 1) if n % d == 0]


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type annotation."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """Field name -> the string below the field in the source of `cls` or of a base."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    inherited = {}
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        inherited |= meanings(base)
    return inherited | {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def as_type(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type.  An int is accepted for a float and a list for a tuple; a
    path is as `files.user_path` gives it.

    Raises:
      ConfigError: another type, or a float that is not finite; `name` is the field's.
    """
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        require(
            value in choices,
            f"config.{name} = {value!r} is not one of {', '.join(map(repr, choices))}.",
        )
        return value
    if origin is tuple and isinstance(value, tuple | list):
        item = typing.get_args(hint)[0]
        return tuple(as_type(f"{name}[{i}]", v, item) for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, hint), f"config.{name} = {value!r} must be a section of fields.")
        return value
    if hint in (LocalPath, AnyPath):
        return user_path(as_type(name, value, str), f"config.{name}", hint)
    if hint is float and type(value) is int:
        return float(value)
    expected = origin or hint
    require(
        type(value) is expected,
        f"config.{name} = {value!r} is {_a(type(value))}; it must be {_a(expected)}.",
    )
    require(hint is not float or math.isfinite(value), f"config.{name} = {value} must be finite.")
    return value


def _a(cls: type) -> str:
    return f"{'an' if cls.__name__[0] in 'aeiou' else 'a'} {cls.__name__}"
