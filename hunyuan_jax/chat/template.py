"""Chat templates in jinja, as model folders bring them: rendered in a sandbox, with the settings
and helpers of transformers.
"""

import datetime
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hunyuan_jax.chat import origin
from hunyuan_jax.chat.origin import Text
from hunyuan_jax.tokenizer import Tokenizer

# Roles that a template may put into the name of a token, as "<|" + role + "|>".
_ROLES = (
    "assistant",
    "developer",
    "environment",
    "function",
    "ipython",
    "model",
    "observation",
    "system",
    "tool",
    "user",
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    parse_special: bool,
    add_generation_prompt: bool,
    **variables: Any,
) -> list[int]:
    """Return the ids of the chat under the tokenizer's template, a list of int.

    Names of special tokens that the template writes are tokens; those in the messages, tools and
    other variables are text, whatever the template does with them, unless `parse_special`, which
    is what transformers does.  `variables` are further names that the template can use, such as
    enable_thinking or tools.

    Warns of a message that the template leaves out.

    Raises ValueError with one line for a template that cannot be read or fails, with the
    template's own word where it refuses, and for messages of a role that it does not know.
    """
    text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt, **variables)
    return encode_text(text, tokenizer, parse_special)


def encode_spans(
    text: Text, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer, *, parse_special: bool
) -> tuple[list[int], list[bool]]:
    """(ids of a rendered chat, whether each overlaps one of the spans of characters).

    Raises ValueError as `encode_text`, and for a tokenizer that cuts texts in its own way.
    """
    ids, found, is_marked = encode_text(text, tokenizer, parse_special), [], []
    for piece, start, end in _pieces(text, tokenizer, parse_special):
        found += piece

        def num_bytes(stop: int, start: int = start, end: int = end) -> int:
            shown = origin.plain(text)[start : min(max(stop, start), end)]
            return len(tokenizer.normalized(shown).encode())

        bounds = [
            (num_bytes(first), num_bytes(last))
            for first, last in spans
            if first < end and last > start
        ]
        last_byte = 0
        for token_id in piece:
            first_byte = last_byte
            last_byte += len(tokenizer.decode_bytes([token_id]))
            is_marked.append(any(first_byte < b and last_byte > a for a, b in bounds))
        if bounds and last_byte != num_bytes(end):
            found.append(-1)
    if found != ids:
        raise ValueError(
            "this chat cannot be labelled: its tokens do not give its text again; use a tokenizer "
            "that keeps texts as they are"
        )
    return ids, is_marked


def has_generation_tag(template: str) -> bool:
    """Whether the template says itself what the assistant writes."""
    return _GENERATION_TAG.search(template) is not None


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **variables: Any) -> Text:
    """Return the text of the chat with its origins; errors and warnings as in `encode_chat`."""
    text = _render(tokenizer, messages, variables)
    _check_nothing_is_left_out(text, tokenizer, messages, variables)
    return text


def _render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Text:
    from jinja2 import TemplateError

    try:
        compiled = _compile(tokenizer.chat_template)
    except TemplateError as e:
        raise ValueError(
            f"the chat template cannot be read: {_one_line(e)}; correct it, or take the one of "
            "the model's folder"
        ) from e
    values = {
        "tools": None,
        "documents": None,
        **origin.own(dict(tokenizer.named_tokens)),
        **{name: _variable(value) for name, value in variables.items()},
        "messages": [_message(index, message) for index, message in enumerate(messages)],
    }
    try:
        return compiled.render(values)
    except Refusal as e:
        raise ValueError(f"the chat template refuses this chat: {_one_line(e)}") from e
    except Exception as e:  # the template is a program of somebody else, and fails like one
        raise ValueError(
            f"the chat template fails on this chat: {type(e).__name__}: {_one_line(e)}; change "
            "the messages, or take another template"
        ) from e


class Refusal(Exception):
    """What `raise_exception` of a template raises."""


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers shows it to a template: without fields that are None, and with
    the names that templates have for its reasoning.
    """
    shown = {name: value for name, value in message.items() if value is not None}
    reasoning = next((shown[name] for name in _REASONING if name in shown), None)
    if reasoning is not None:
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    shown = origin.written_by(shown, origin.of_message(index))
    if shown["role"] in _ROLES:
        shown["role"] = origin.own(shown["role"])
    return shown


def _variable(value: Any) -> Any:
    """A setting of one word is the program's, and may be part of a token's name; others are text
    of anybody.
    """
    is_word = isinstance(value, str) and re.fullmatch(r"\w+", value)
    return origin.own(value) if is_word else origin.written_by(value, origin.VARIABLE)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    return _environment_class()().from_string(template)


@functools.cache
def _environment_class() -> type:
    """The sandbox of transformers, with texts that know their origin."""
    import jinja2
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.filters import make_attrgetter
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

    @jinja2.pass_environment
    def join(
        environment: Any, values: Any, separator: str = "", attribute: str | int | None = None
    ) -> Text:
        if attribute is not None:
            values = map(make_attrgetter(environment, attribute), values)
        parts = list(map(origin.as_text, values))
        return Text(separator, origin.origins_of(separator)).join(parts)

    class OriginCodeGenerator(CodeGenerator):
        """Marks the template's own strings, and keeps origins through `~`."""

        def visit_Const(self, node: Any, frame: Any) -> None:
            if isinstance(node.value, str | list | tuple | dict):
                self.write(f"environment.own({node.value!r})")
            else:
                super().visit_Const(node, frame)

        def visit_TemplateData(self, node: Any, frame: Any) -> None:
            self.write(f"environment.own({node.data!r})")

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def _output_const_repr(self, group: Any) -> str:
            return f"environment.own({''.join(map(str, group))!r})"

    class GenerationTag(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant writes."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_learned")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _learned(self, caller: Callable[[], str]) -> Text:
            return origin.learned(caller())

    class OriginEnvironment(ImmutableSandboxedEnvironment):
        code_generator_class = OriginCodeGenerator
        concat = staticmethod(origin.concat)
        own = staticmethod(origin.own)

        def __init__(self):
            super().__init__(
                trim_blocks=True,
                lstrip_blocks=True,
                extensions=[GenerationTag, loopcontrols],
                finalize=origin.as_text,
            )
            title = self.filters["title"]
            self.filters["tojson"] = origin.to_json
            self.filters["indent"] = origin.indent
            self.filters["safe"] = lambda text: text
            self.filters["title"] = lambda text: origin.mapped(text, title(text))
            self.filters["join"] = join
            self.globals["raise_exception"] = _refuse
            self.globals["strftime_now"] = lambda form: Text(
                datetime.datetime.now().strftime(form), origin.origins_of(form)[:1] or origin.OWN
            )

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is None or not isinstance(value.__self__, Text):
                return wrapped

            def formatted(*args: Any, **kwargs: Any) -> str:
                plain = str.__getitem__(wrapped(*args, **kwargs), slice(None))
                if value.__name__ == "format_map":
                    args, kwargs = (), args[0]
                pieces = origin.brace_pieces(
                    value.__self__, SandboxedFormatter(self), args, kwargs
                )
                return origin.found_as(plain, pieces)

            return formatted

    return OriginEnvironment


def _refuse(message: str) -> None:
    raise Refusal(message)


def _check_nothing_is_left_out(
    text: Text,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> None:
    """Refuses messages of a role that the template does not know; warns of others that it leaves
    out.
    """
    written = set(origin.without_learned(origin.origins_of(text)))
    for index, message in enumerate(messages):
        if origin.of_message(index) in written or not _says_something(message):
            continue
        others = [*messages[:index], *messages[index + 1 :]]
        is_used = (
            _renders_otherwise(text, tokenizer, others, variables)
            if others
            else origin.UNKNOWN in written
        )
        if is_used:
            continue
        role = message["role"]
        known = [name for name in _ROLES if _names(tokenizer.chat_template, name)]
        if known and not _names(tokenizer.chat_template, role):
            raise ValueError(
                f"messages[{index}] has role {role!r}, which this chat template leaves out; it "
                f"knows {', '.join(known)}: rename the role or drop the message"
            )
        warnings.warn(
            f"the chat template leaves out messages[{index}] of role {role!r}: the model does not "
            "see it",
            stacklevel=5,
        )


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content") or ""
    if isinstance(content, str):
        return bool(content.strip() or message.get("tool_calls"))
    return True


def _renders_otherwise(
    text: Text,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> bool:
    try:
        return str.__ne__(text, _render(tokenizer, messages, variables))
    except ValueError:
        return True


def _names(template: str, word: str) -> bool:
    """Whether the template has the word as a string."""
    return f"'{word}'" in template or f'"{word}"' in template


def encode_text(text: Text, tokenizer: Tokenizer, parse_special: bool) -> list[int]:
    """The ids of a rendered chat; only what the template has written itself becomes a token."""
    plain, names = origin.plain(text), tokenizer.special_names
    if parse_special or not names:
        return tokenizer.encode(plain, parse_special=parse_special)
    origins = origin.without_learned(origin.origins_of(text))
    found = list(_any_of(names).finditer(plain))
    writers = [set(origins[slice(*match.span())]) for match in found]
    if all(writer == {origin.OWN} for writer in writers):
        # As transformers does it.  Anything that only the tokenizer takes for a token, such as a
        # name in other letters, shows here.
        ids = tokenizer.encode(plain, parse_special=True)
        special = set(map(tokenizer.special_id, names))
        if [i for i in ids if i in special] == [tokenizer.special_id(m[0]) for m in found]:
            return ids
    template = tokenizer.chat_template or ""
    named = [value for name, value in tokenizer.named_tokens.items() if name in template]
    for match, writer in zip(found, writers, strict=True):
        is_lost = origin.UNKNOWN in writer <= {origin.OWN, origin.UNKNOWN}
        if is_lost and any(match[0] in words for words in (template, *named)):
            raise ValueError(
                f"the chat template computes {match[0]} so that nobody can tell its own text from "
                "that of a message; take a template that writes it out"
            )
    return [i for piece, _, _ in _pieces(text, tokenizer, parse_special) for i in piece]


def _pieces(
    text: Text, tokenizer: Tokenizer, parse_special: bool
) -> Iterator[tuple[list[int], int, int]]:
    """(ids, first character, last + 1) of each special token and of each text between them."""
    plain, names = origin.plain(text), tokenizer.special_names
    origins = origin.without_learned(origin.origins_of(text))
    runs = re.finditer(".+" if parse_special else f"{origin.OWN}+", origins, re.DOTALL)
    start = 0
    for run in runs if names else ():
        for match in _any_of(names).finditer(plain, *run.span()):
            yield tokenizer.encode(plain[start : match.start()]), start, match.start()
            yield [tokenizer.special_id(match[0])], *match.span()
            start = match.end()
    yield tokenizer.encode(plain[start:]), start, len(plain)


@functools.lru_cache(maxsize=16)
def _any_of(names: tuple[str, ...]) -> re.Pattern:
    """Matches a name; of two that begin alike the longer one."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
