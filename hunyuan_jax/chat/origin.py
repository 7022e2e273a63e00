"""Text that knows who wrote each of its characters, through whatever a chat template does with it.

A chat template is a program that mixes its own text with that of the messages.  Only its own text
may become special tokens, so each character carries its origin: `OWN` for the template's, a
message's number for a message's, `UNKNOWN` where an operation lost track.  `Text` is a str in
every other way, so that a template sees what it would see in transformers.
"""
# ruff: noqa: D102 (the methods of Text are those of str)

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, SupportsIndex

# Origins are characters, one for each character of a text.
OWN, UNKNOWN, VARIABLE = map(chr, range(3))
_FIRST_MESSAGE = 3
_LEARNED = 0x80000  # added to the origin of what stands between {% generation %} tags


def of_message(index: int) -> str:
    """The origin of the text of messages[index]."""
    return chr(_FIRST_MESSAGE + index)


class Text(str):
    """A str with the origin of each character.

    Methods that keep, cut or join characters return a Text.  Those that are not here return a
    plain str, which counts as UNKNOWN.
    """

    _origins: str  # private: a template has no access to names that start with _

    def __new__(cls, text: str, origins: str | None = None) -> Self:
        """`origins`: one for all characters, or one for each; default UNKNOWN."""
        self = super().__new__(cls, text)
        origins = UNKNOWN if origins is None else origins
        self._origins = origins * len(text) if len(origins) == 1 else origins
        assert len(self._origins) == len(text)
        return self

    def __getnewargs__(self) -> tuple[str, str]:
        return plain(self), self._origins

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> "Text":
        return Text(super().__getitem__(key), self._origins[key])

    def __iter__(self) -> Iterator["Text"]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: str) -> "Text":
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Text":
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Text":
        return Text(super().__mul__(count), self._origins * count)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        formatted = super().__mod__(values)
        try:
            return found_as(formatted, _percent_pieces(self, values))
        except (TypeError, ValueError, KeyError):
            return formatted

    def __rmod__(self, template: str) -> str:
        return NotImplemented if not isinstance(template, str) else Text(template) % self

    def join(self, parts: Iterable[str]) -> "Text":
        pieces = []
        for number, part in enumerate(parts):
            if not isinstance(part, str):
                raise TypeError(
                    f"sequence item {number}: expected str instance, {type(part).__name__} found"
                )
            pieces += [self, part] if number else [part]
        return concat(pieces)

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:
            return super().replace(old, new, count)
        return Text(new, origins_of(new)).join(self.split(old, count))

    def strip(self, chars: str | None = None) -> "Text":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Text":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> "Text":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str) -> "Text":
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> "Text":
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Text"]:
        return self._cut(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Text"]:
        return self._cut(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list["Text"]:
        lines = self._cut(super().splitlines(True), "")
        shown = super().splitlines(keepends)
        return [line[: len(part)] for line, part in zip(lines, shown, strict=True)]

    def partition(self, sep: str) -> tuple["Text", ...]:
        return tuple(self._cut(super().partition(sep), ""))

    def rpartition(self, sep: str) -> tuple["Text", ...]:
        return tuple(self._cut(super().rpartition(sep), ""))

    def upper(self) -> str:
        return mapped(self, super().upper())

    def lower(self) -> str:
        return mapped(self, super().lower())

    def capitalize(self) -> str:
        return mapped(self, super().capitalize())

    def title(self) -> str:
        return mapped(self, super().title())

    def swapcase(self) -> str:
        return mapped(self, super().swapcase())

    def casefold(self) -> str:
        return mapped(self, super().casefold())

    def ljust(self, width: SupportsIndex, fill: str = " ") -> "Text":
        return self + Text(fill, origins_of(fill)) * (width - len(self))

    def rjust(self, width: SupportsIndex, fill: str = " ") -> "Text":
        return Text(fill, origins_of(fill)) * (width - len(self)) + self

    def _cut(self, parts: Iterable[str], sep: str | None = None) -> list["Text"]:
        """The parts of a split at `sep` (None: at blanks), in order, as pieces of this text."""
        found, start = [], 0
        for part in parts:
            start = self.find(part, start) if sep is None else start
            found.append(self[start : start + len(part)])
            start += len(part) + len(sep or "")
        return found


def origins_of(text: str) -> str:
    """One origin for each character; UNKNOWN of a plain str."""
    return text._origins if isinstance(text, Text) else UNKNOWN * len(text)


def plain(text: str) -> str:
    """The text as a str without origins."""
    return str.__getitem__(text, slice(None))


def without_learned(origins: str) -> str:
    """The origins with no mark of {% generation %}."""
    if max(origins, default=OWN) < chr(_LEARNED):
        return origins
    return "".join(chr(ord(origin) % _LEARNED) for origin in origins)


def learned(text: str) -> "Text":
    """The text, marked as what stands between {% generation %} tags."""
    origins = without_learned(origins_of(text))
    return Text(text, "".join(chr(ord(origin) + _LEARNED) for origin in origins))


def learned_spans(text: Text) -> list[tuple[int, int]]:
    """(start, end) of what `learned` has marked, in order."""
    pattern = f"[{chr(_LEARNED)}-{chr(0x10FFFF)}]+"
    return [found.span() for found in re.finditer(pattern, text._origins)]


def first_of_message(text: Text, index: int) -> int:
    """Where the text of messages[index] begins; len(text) if it is left out."""
    start = without_learned(text._origins).find(of_message(index))
    return len(text) if start < 0 else start


def own(value: Any) -> Any:
    """A constant of the template, its strings marked as the template's own."""
    if isinstance(value, str):
        return Text(value, OWN)
    if isinstance(value, dict):
        return {own(key): own(item) for key, item in value.items()}
    return type(value)(map(own, value)) if isinstance(value, list | tuple) else value


def written_by(value: Any, origin: str) -> Any:
    """Messages, tools and the like with every string, keys included, marked by its origin.

    Plain containers come out: mappings as dict, objects with `model_dump` as their fields.  What a
    Text says is the template's own remains so.
    """
    if isinstance(value, Text):
        return Text(value, "".join(o if o == OWN else origin for o in value._origins))
    if isinstance(value, str):
        return Text(value, origin)
    if isinstance(value, Mapping):
        return {written_by(k, origin): written_by(item, origin) for k, item in value.items()}
    if isinstance(value, list | tuple):
        marked = [written_by(item, origin) for item in value]
        return tuple(marked) if isinstance(value, tuple) else marked
    if callable(getattr(value, "model_dump", None)):
        return written_by(value.model_dump(), origin)
    return value


def concat(parts: Iterable[Any]) -> Text:
    """The parts joined; numbers, true, false and none count as the template's own."""
    texts, origins = [], []
    for part in parts:
        text = as_text(part)
        texts.append(text)
        origins.append(origins_of(text))
    return Text("".join(texts), "".join(origins) or OWN)


def as_text(value: Any) -> str:
    """str(value), which is the template's own for numbers, true, false and none."""
    if value is None or isinstance(value, bool | int | float):
        return Text(str(value), OWN)
    return str(value)


def mapped(text: str, changed: str) -> str:
    """`changed`, made from `text` character by character, as upper() does it."""
    origins = origins_of(text)
    if len(changed) != len(text):
        origins = origins[:1] if len(set(origins)) == 1 else UNKNOWN
    return Text(changed, origins or OWN)


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """jinja's filter of that name."""
    space = own(" " * width) if isinstance(width, int) else width
    lines = (Text(text, origins_of(text)) + own("\n")).splitlines()
    indented = [
        line if not (first if number == 0 else blank or line) else space + line
        for number, line in enumerate(lines)
    ]
    return own("\n").join(indented)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Text:
    """`json.dumps`, whose punctuation and numbers count as the template's own."""
    space = own(" " * indent) if isinstance(indent, int) else indent
    between, colon = separators or own(("," if space is not None else ", ", ": "))

    def line(level: int) -> str:
        return "" if space is None else own("\n") + space * level

    def written(value: Any, level: int) -> Iterator[str]:
        if isinstance(value, str):
            yield _json_string(value, ensure_ascii)
        elif isinstance(value, dict):
            yield own("{")
            for number, (key, item) in enumerate(
                sorted(value.items()) if sort_keys else value.items()
            ):
                yield from (between if number else "", line(level + 1))
                yield from (_json_key(key, ensure_ascii), colon)
                yield from written(item, level + 1)
            yield from (line(level) if value else "", own("}"))
        elif isinstance(value, list | tuple):
            yield own("[")
            for number, item in enumerate(value):
                yield from (between if number else "", line(level + 1))
                yield from written(item, level + 1)
            yield from (line(level) if value else "", own("]"))
        else:
            yield own(json.dumps(value))

    return concat(written(value, 0))


def _json_string(text: str, ensure_ascii: bool) -> Text:
    """A JSON string; each character has the origin of the one that it stands for."""
    pieces, start = [own('"')], 0
    for origin, run in itertools.groupby(origins_of(text)):
        end = start + sum(1 for _ in run)
        escaped = json.dumps(str.__getitem__(text, slice(start, end)), ensure_ascii=ensure_ascii)
        pieces.append(Text(escaped[1:-1], origin))
        start = end
    return concat([*pieces, own('"')])


def _json_key(key: Any, ensure_ascii: bool) -> Text:
    if isinstance(key, str):
        return _json_string(key, ensure_ascii)
    # As json does it: {1: 2} has the key "1", and an error for what cannot be one.
    return own(json.dumps({key: 0})[1:-4])


def found_as(formatted: str, pieces: Iterable[str]) -> str:
    """The formatted text by pieces that have origins, if they make it up."""
    text = concat(pieces)
    return text if str.__eq__(text, formatted) else formatted


def _percent_pieces(template: Text, values: Any) -> list[str]:
    """The pieces of `template % values`; wrong for what chat templates do not use, such as %*d."""
    remaining = iter(values if isinstance(values, tuple) else (values,))
    pieces, start = [], 0
    for found in re.finditer(r"%(?:\((\w+)\))?([-+ #0-9.]*)([a-zA-Z%])", template):
        pieces.append(template[start : found.start()])
        start = found.end()
        name, flags, kind = found.groups()
        if kind == "%":
            pieces.append(template[start - 1 : start])
            continue
        value = values[name] if name else next(remaining, "")
        if kind == "s" and not flags:
            pieces.append(as_text(value))
        else:
            pieces.append(mapped(as_text(value), f"%{flags}{kind}" % (value,)))
    return [*pieces, template[start:]]


def brace_pieces(
    template: Text, formatter: string.Formatter, args: tuple, kwargs: Mapping[str, Any]
) -> Iterator[str]:
    """The pieces of `template.format(*args, **kwargs)`."""
    origin = template._origins[:1] if len(set(template._origins)) == 1 else UNKNOWN
    number = 0
    for literal, field, spec, conversion in formatter.parse(template):
        yield Text(literal, origin)
        if field is not None:
            if not field or field[0] in ".[":
                field, number = f"{number}{field}", number + 1
            value = formatter.get_field(field, args, kwargs)[0]
            is_plain = not spec and conversion in (None, "s")
            yield as_text(value) if is_plain else formatter.format_field(value, spec)
