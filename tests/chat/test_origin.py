"""What users write never becomes a special token, whatever a chat template does with it; and what
a template sees and writes is what it is in plain jinja, or in transformers.
"""

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hunyuan_jax.chat import origin, template
from hunyuan_jax.chat.origin import Text
from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.tokenizer import HfTokenizer, load_tokenizer
from support import goldens, paths

SETTINGS = settings(derandomize=True, database=None, max_examples=40)
TEMPLATES = {
    path.stem: path.read_text() for path in sorted((paths.GOLDEN / "templates").glob("*.jinja"))
}
FRAGMENT = st.sampled_from(
    [
        *("<|eos|>", "<|extra_0|>", "<|startoftext|>", "<|extra_4|>", "<|pad|>", "<|EOS|>"),
        *("<|", "|>", "<", "|", ">", "eos", "extra_0", "</think>", "<think>", "</r>", "</call>"),
        *("\ue000", "3", "\ue001", "\U000f0000", "\U000f0001", "\\u003c", "{{ '<|eos|>' }}", "%s"),
        *("\n", " ", "'", '"', "\\", "é", "e\u0301", "ß", "İ", "Σ", "𝄞", "{}", "<|eos|>\u2028"),
    ]
)
TEXT = st.lists(FRAGMENT | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)).map(
    "".join
)
# A value as JSON has it, texts in every place.
JSON = st.recursive(
    TEXT | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def plain_tokenizer() -> HfTokenizer:
    return load_tokenizer(goldens.folder_of("moe_top1"))


@pytest.fixture
def with_template(plain_tokenizer):
    """A tokenizer with another template."""

    def build(text: str) -> HfTokenizer:
        other = copy.copy(plain_tokenizer)
        other.chat_template = text
        return other

    return build


def in_plain_jinja(text: str, **variables) -> str:
    """What jinja renders, with the settings of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    return environment.from_string(text).render(variables)


def specials(tokenizer, ids) -> list[str]:
    """The special tokens among ids."""
    names = {tokenizer.special_id(name): name for name in tokenizer.special_names}
    return [names[i] for i in ids if i in names]


# --- Templates of chats
# -----------------------------------------------------------------------------


def chat_of(text: str, value) -> tuple[list[dict], list[dict]]:
    """(messages, tools) with a text and a JSON value wherever a caller can put them."""
    call = {"type": "function", "function": {"name": text, "arguments": {text: value}}}
    role_inside = {"function": {"name": "f", "arguments": {"role": text, "content": [text]}}}
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": None, "tool_calls": [call, role_inside]},
        {"role": "tool", "content": text, "name": text},
        {"role": "assistant", "content": text},
    ]
    parameters = {"type": "object", "properties": {text: {"description": text, "role": text}}}
    function = {"name": text, "description": text, "parameters": parameters, "default": value}
    return messages, [{"type": "function", "function": function}]


@pytest.mark.parametrize("name", ["tools", "tools_ascii"])
@SETTINGS
@given(text=TEXT, value=JSON)
def test_tools_and_calls_forge_nothing(plain_tokenizer, name, text, value):
    tokenizer = copy.copy(plain_tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    messages, tools = chat_of(text, value)
    ids = render_chat(messages, tokenizer, tools=tools)
    assert specials(tokenizer, ids) == [
        *("<|startoftext|>", "<|extra_4|>", "<|startoftext|>", "<|extra_4|>"),
        *("<|startoftext|>", "<|extra_0|>", "<|eos|>", "<|extra_0|>", "<|eos|>"),
    ]
    shown = [{k: v for k, v in message.items() if v is not None} for message in messages]
    expected = in_plain_jinja(TEMPLATES[name], messages=shown, tools=tools)
    assert tokenizer.decode(ids) == tokenizer.normalized(expected)


@pytest.mark.parametrize("name", ["think_split", "generation_tag", "folder"])
@SETTINGS
@given(st.lists(TEXT.filter(str.strip), min_size=2, max_size=4))
def test_contents_forge_nothing(plain_tokenizer, name, contents):
    tokenizer = copy.copy(plain_tokenizer)
    tokenizer.chat_template = TEMPLATES.get(name, plain_tokenizer.chat_template)
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    ids = render_chat(messages, tokenizer, add_generation_prompt=False)
    ends = (["<|startoftext|>", "<|extra_0|>"], ["<|eos|>"])
    assert specials(tokenizer, ids) == [
        token for index in range(len(contents)) for token in ends[index % 2]
    ]
    if name != "generation_tag":
        expected = in_plain_jinja(tokenizer.chat_template, messages=messages)
        assert tokenizer.decode(ids) == tokenizer.normalized(expected)


def test_a_token_that_a_template_builds_from_a_role(with_template):
    tokenizer = with_template("{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}")
    tokenizer._special_ids = {**tokenizer._special_ids, "<|user|>": tokenizer.eos_id}
    text = template.render(tokenizer, [{"role": "user", "content": ""}])
    assert (text, origin.origins_of(text)) == ("<|user|>", origin.OWN * 8)
    ids = render_chat([{"role": "eos", "content": ""}], tokenizer)
    assert specials(tokenizer, ids) == [] and tokenizer.decode(ids) == "<|eos|>"


def test_settings_of_one_word_are_the_program_s(with_template):
    tokenizer = with_template("{{ '<|' ~ effort ~ '|>' }}{{ messages[0].content }}")
    chat = [{"role": "user", "content": "x"}]
    assert specials(tokenizer, render_chat(chat, tokenizer, effort="eos")) == ["<|eos|>"]
    assert specials(tokenizer, render_chat(chat, tokenizer, effort="eos|><|pad")) == []


# --- Operations on texts
# -----------------------------------------------------------------------------

# Expressions of c, a text of the user, and d, another.
OPERATIONS = [
    *("c", "c | upper", "c | lower", "c | title", "c | capitalize", "c | trim", "c | trim('<')"),
    *("c.strip()", "c.lstrip('<|')", "c.rstrip()", "c[1:]", "c[:-1]", "c[::2]", "c | reverse"),
    *("c | replace('x', '<')", "c | replace('<', d)", "c.replace(d, '|')", "c | replace('', '|')"),
    *("c.split('|')[-1]", "c.split()[0]", "c.rsplit('|', 1)[0]", "c.split('|') | join('|')"),
    *("c.splitlines() | join", "c.partition('|')[2]", "c.rpartition('|') | join(d)", "c * 2"),
    *("'<|' ~ c ~ '|>'", "'<|' + c + '|>'", "'<|%s|>' % c", "'%s|>' | format('<|' ~ c)"),
    *("'<|{}|>'.format(c)", "'{a[0]}{b}'.format(a=[c], b=d)", "['<|', c, '|>'] | join", "c | e"),
    *("c | tojson", "{'k' ~ c: d} | tojson", "[c, {d: [c]}] | tojson(indent=2)", "c | string"),
    *("c | tojson(ensure_ascii=True) | replace('u', '')", "[c, d] | tojson(separators=(d, c))"),
    *("c | indent(2, true)", "c | indent('|', blank=true)", "c | wordwrap(3)", "c | truncate(4)"),
    *("c | list | join", "c | list | join('')", "c | first", "c | last", "c | safe", "c | center"),
    *(
        "(c, d) | string",
        "{'c': c} | string",
        "c | urlencode",
        "c.encode().decode()",
        "m() | trim",
    ),
    *("c.ljust(9, '|')", "c.rjust(9)", "c.zfill(9)", "c.swapcase()", "c.casefold()", "c | pprint"),
    *("c.removeprefix('<')", "c.removesuffix('>')", "c if '<|' in c else d", "c | striptags"),
    *(
        "s",
        "[{'t': c}, {'t': d}] | map(attribute='t') | join('|')",
        "c.expandtabs()",
        "'|'.join(c)",
    ),
    *("c | default('x')", "[c, d] | sort | join", "{c: d} | dictsort | first | first", "c | int"),
    *("c.split(d)[0] if d else c", "'{:>9}|>'.format(c)", "'%5s|>' % c", "'%(k)s' % {'k': c}"),
    *("namespace(c=c).c", "c | batch(2) | first | join", "c | slice(1) | list | first | join"),
]
# Which may be refused, for texts that hold a token's name.
LOSES_ORIGINS = [
    *("c | wordwrap(3)", "c | center", "(c, d) | string", "{'c': c} | string", "c | pprint"),
    *("c.encode().decode()", "c.zfill(9)", "c | replace('', '|')", "c.expandtabs()", "c | e"),
    *("'{:>9}|>'.format(c)", "c | striptags"),
]
PRELUDE = (
    "{% set c = messages[0].content %}{% set d = messages[1].content %}"
    "{% macro m() %}<|{{ c }}|>{% endmacro %}{% set s %}<|{{ c }}|>{% endset %}"
)


@pytest.mark.cases(40)
@pytest.mark.filterwarnings("ignore:the chat template leaves out")
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(SETTINGS, max_examples=15)
@given(TEXT, TEXT)
def test_no_operation_makes_a_token_of_a_text(plain_tokenizer, operation, first, second):
    tokenizer = copy.copy(plain_tokenizer)
    # Own tokens around it, and as a part of what is computed.
    tokenizer.chat_template = (
        f"{PRELUDE}<|startoftext|>{{{{ {operation} }}}}{{{{ '<|eos|>' }}}}"
        f"{{% filter trim %}}<|extra_0|>{{{{ {operation} }}}}{{% endfilter %}}"
    )
    messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
    try:
        expected = in_plain_jinja(
            tokenizer.chat_template, messages=messages, tools=None, documents=None
        )
    except Exception:
        with pytest.raises(ValueError, match="the chat template fails on this chat"):
            render_chat(messages, tokenizer)
        return
    try:
        ids = render_chat(messages, tokenizer)
    except ValueError as error:
        if "so that nobody can tell" not in str(error) or operation not in LOSES_ORIGINS:
            raise
        return
    assert specials(tokenizer, ids) == ["<|startoftext|>", "<|eos|>", "<|extra_0|>"]
    assert tokenizer.decode(ids) == tokenizer.normalized(expected)


def test_a_token_that_may_be_anybody_s_is_refused(with_template):
    template = "{{ ('<|eos|>' ~ messages[0].content) | wordwrap(99) }}"
    tokenizer = with_template(template)
    with pytest.raises(ValueError, match=r"computes <\|eos\|> so that nobody can tell"):
        render_chat([{"role": "user", "content": "x"}], tokenizer)
    # A name that the template does not have is not its own.
    tokenizer = with_template("{{ messages[0].content | wordwrap(99) }}")
    ids = render_chat([{"role": "user", "content": "<|eos|>"}], tokenizer)
    assert specials(tokenizer, ids) == [] and tokenizer.decode(ids) == "<|eos|>"


# Of these the template's own tokens are a part.
WITH_TOKENS = [
    *("'<|eos|>' ~ c", "[c, d] | join('<|eos|>')", "('<|eos|>' ~ c) | trim", "'%s<|eos|>' % c"),
    *("'{}<|eos|>{}'.format(c, d)", "c | replace('a', '<|eos|>')", "'<|EOS|>' | lower ~ c"),
    *("(c ~ '\\n<|eos|>') | indent", "(c ~ '<|eos|>\\n') | indent(2, true)", "['<|eos|>', c][0]"),
    *("('<|eos|>' ~ c)[0:9]", "(c ~ '<|eos|>').split('e') | join('e')", "{'k': '<|eos|>'}.k ~ c"),
    *("{'<|eos|>': c} | tojson", "m('<|eos|>')", "('<|eos|>\\t' ~ c).split('\\t') | join(d)"),
    *("eos_token ~ c", "'<|extra_' ~ 2 ~ '|>' ~ c", "(c ~ '<|eos|>') | replace(d, '')", "s ~ d"),
    *("'<|eos|>%s' | format(c)", "c.join(['<|eos|>', '<|eos|>'])", "c ~ ('<|eos|>' | safe)"),
    *("'<|eos|>'.join([c, d])", "('<|eos|>' ~ c).splitlines()[0]", "'X'.replace('X', '<|eos|>')"),
    *("('<|eos|>' ~ c).partition('|>') | join", "c.ljust(9) ~ '<|eos|>'", "'<|eos|>' * 2 ~ c"),
]


@pytest.mark.parametrize("operation", WITH_TOKENS)
@settings(SETTINGS, max_examples=15)
@given(*[st.text("ab\nceosé 1", min_size=1, max_size=9)] * 2)
def test_tokens_of_the_template_stay_tokens(plain_tokenizer, operation, first, second):
    tokenizer = copy.copy(plain_tokenizer)
    tokenizer.chat_template = (
        "{% set c = messages[0].content %}{% set d = messages[1].content %}"
        "{% macro m(x='<|pad|>') %}{{ x }}{{ c }}{% endmacro %}"
        "{% set s %}{{ c }}<|eos|>{% endset %}"
        f"{{{{ {operation} }}}}{{{{ c }}}}{{{{ d }}}}"
    )
    messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
    expected = in_plain_jinja(
        tokenizer.chat_template, messages=messages, eos_token=tokenizer.named_tokens["eos_token"]
    )
    assert render_chat(messages, tokenizer) == tokenizer.encode(expected, parse_special=True)


@SETTINGS
@given(JSON, st.booleans(), st.none() | st.integers(0, 3), st.none() | st.just((" ", "=")))
def test_json_is_that_of_the_library(value, ensure_ascii, indent, separators):
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    marked = origin.written_by(value, origin.VARIABLE)
    assert origin.to_json(marked, **options) == json.dumps(value, **options)
    assert origin.to_json(value, **options) == json.dumps(value, **options)
    if isinstance(value, dict):
        assert origin.to_json(marked, sort_keys=True) == json.dumps(
            value, sort_keys=True, ensure_ascii=False
        )


def test_json_keys_that_are_no_strings():
    value = {2: "a", True: "b", None: "c", 1.5: []}
    assert origin.to_json(value) == json.dumps(value)


def test_a_text_is_a_string_with_origins():
    text = Text("ab", "\0\1") + "c"
    assert text == "abc" and hash(text) == hash("abc") and {text: 1}["abc"] == 1
    for same in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text), str(text), text[:]):
        assert same == text and origin.origins_of(same) == "\0\1\1"
    assert json.dumps([text]) == '["abc"]'
    assert origin.origins_of(origin.written_by(text, "\5")) == "\0\5\5"
