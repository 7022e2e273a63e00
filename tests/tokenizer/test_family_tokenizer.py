"""Tokenizers and chat templates that model folders bring: as transformers reads them, and never a
turn that a content forges.
"""

import base64
import json
import pathlib
import pickle
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.chat.labels import IGNORED_LABEL, sft_example
from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import HfTokenizer, HyTokenizer, StreamDecoder, load_tokenizer
from support import goldens

SETTINGS = settings(derandomize=True, database=None, max_examples=50)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "héllo 12"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "  more\n"},
]
# What Hunyuan's templates use: nested blocks that are trimmed, a namespace, tojson, refusals, a
# switch for thinking.
THINKING = """
{%- if messages[0].role == 'tool' %}\
{{ raise_exception('a chat cannot begin with a tool') }}{% endif %}
{% set ns = namespace(n=0) %}
{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {% if m.role == 'user' %}
        {{- '<|startoftext|>' + m.content + '<|extra_0|>' }}
    {% elif m.role == 'assistant' %}
        {{- m.content + eos_token }}
    {% else %}
        {{- {'n': ns.n, 'text': m.content} | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}\
{{ '<think>\\n\\n</think>\\n' }}{% endif %}
"""
VALID_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TRICKY_TEXT = st.lists(
    st.sampled_from(["<|eos|>", "<|extra_0|>", "<|", "|>", "hello 12", "e\u0301", "\ue0003\ue001"])
    | VALID_TEXT
).map("".join)


@pytest.fixture(scope="module")
def source() -> pathlib.Path:
    return goldens.folder_of("moe_top1")


@pytest.fixture
def folder(tmp_path, source) -> pathlib.Path:
    """A copy of a model folder's text files."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(source) -> HfTokenizer:
    return load_tokenizer(source)


def with_template(tokenizer, template: str) -> HfTokenizer:
    other = pickle.loads(pickle.dumps(tokenizer))
    other.chat_template = template
    return other


# --- tokenizer.json
# -----------------------------------------------------------------------------


@SETTINGS
@given(TRICKY_TEXT)
def test_text_comes_back_and_forges_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    import unicodedata

    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)  # its normalizer
    assert not {tokenizer.special_id(name) for name in tokenizer.special_names} & set(ids)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_ids_are_those_of_transformers(tokenizer, source):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(source)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert tokenizer.vocab_size == len(theirs)
    for string in ("", "héllo <|eos|> wörld", "海 12\n\n  x", "<|extra_0|><|pad|>"):
        ids = theirs.encode(string, add_special_tokens=False)
        assert tokenizer.encode(string, parse_special=True) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids)
        assert tokenizer.decode(ids, skip_special=True) == theirs.decode(
            ids, skip_special_tokens=True
        )


def test_special_names_and_ids(tokenizer):
    name = "<|eos|>"
    assert (
        tokenizer.encode(name, parse_special=True)
        == [tokenizer.special_id(name)]
        == [tokenizer.eos_id]
    )
    assert tokenizer.decode([tokenizer.eos_id, 9999]) == name + "\ufffd"
    assert tokenizer.decode([tokenizer.eos_id, 9999], skip_special=True) == ""
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(name) == tokenizer.encode(name) != [tokenizer.eos_id]


def test_stop_ids_come_from_the_generation_config(folder):
    eos = load_tokenizer(folder).eos_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 5]}))
    assert (
        load_tokenizer(folder).stop_ids
        == load_tokenizer(folder / "tokenizer.json").stop_ids
        == (eos, 5)
    )


def test_tokens_that_are_not_named(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|eos|>"}}')
    tokenizer = load_tokenizer(folder)
    assert (
        tokenizer.bos_id == tokenizer.pad_id == tokenizer.eos_id == tokenizer.special_id("<|eos|>")
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"is not a tokenizer\.json"),
        ("tokenizer_config.json", "[]", "holds a JSON list"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "{}", "names no eos_token"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<nope>"}',
            "eos_token = '<nope>' is not a token",
        ),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token = 3 must be a string"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|eos|>", "chat_template": 3}',
            "chat_template is a int",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|eos|>", "chat_template": [{"name": "rag", "template": ""}]}',
            "none named 'default'",
        ),
    ],
)
def test_damaged_files_are_one_clear_line(folder, file, content, message):
    (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_other_kinds_of_tokenizer_json_are_refused(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(
        json.dumps(
            data
            | {"decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}}
        )
    )
    with pytest.raises(ConfigError, match="its decoder is Metaspace; only ByteLevel"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match="is not a file"):
        load_tokenizer(folder / "nowhere.json")


def test_a_folder_with_ranks(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"holds no tokenizer: neither tokenizer\.json nor hy\.tiktoken"
    ):
        load_tokenizer(folder)
    (folder / "hy.tiktoken").write_bytes(
        b"".join(base64.b64encode(bytes([byte])) + b" 0\n" for byte in range(256))
    )
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HyTokenizer) and tokenizer.vocab_size == 256 + 209
    assert tokenizer.chat_template and render_chat(CHAT[1:2], tokenizer)[
        0
    ] == tokenizer.special_id("<|startoftext|>")
    assert load_tokenizer(folder / "hy.tiktoken").chat_template is None
    # A13B has one special token more, and a table without padding.
    (folder / "config.json").write_text('{"vocab_size": 466}')
    assert load_tokenizer(folder).special_id("<|extra_204|>") == 465


# --- Chat templates
# -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [None, THINKING], ids=["folder", "thinking"])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[:3], CHAT[1:2]], ids=len)
def test_chats_are_those_of_transformers(tokenizer, source, template, chat):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(source)
    ours = tokenizer if template is None else with_template(tokenizer, template)
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        if template is None and variables:
            continue
        for is_prompt in (True, False):
            expected = theirs.apply_chat_template(
                chat,
                chat_template=template,
                add_generation_prompt=is_prompt,
                tokenize=True,
                return_dict=False,
                **variables,
            )
            assert (
                render_chat(chat, ours, add_generation_prompt=is_prompt, **variables) == expected
            )


@pytest.mark.filterwarnings("ignore:the chat template leaves out")
def test_a_prompt_is_what_does_not_end_with_an_answer(tokenizer):
    thinking = with_template(
        tokenizer, "{{ 'P' if add_generation_prompt else 'N' }}{{ messages[0].content }}"
    )
    assert thinking.decode(render_chat(CHAT, thinking)) == "PBe brief."
    assert thinking.decode(render_chat(CHAT[:3], thinking)) == "NBe brief."


@SETTINGS
@given(TRICKY_TEXT, TRICKY_TEXT)
def test_a_content_cannot_forge_a_turn(tokenizer, first, second):
    chat = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    ids = render_chat(chat, tokenizer)
    special = [
        i for i in ids if i in {tokenizer.special_id(name) for name in tokenizer.special_names}
    ]
    assert [tokenizer.decode([i]) for i in special] == [
        "<|startoftext|>",
        "<|extra_0|>",
        "<|eos|>",
    ]
    # Nothing else is changed: the text is that of the parsed form.
    assert tokenizer.decode(ids) == tokenizer.decode(
        render_chat(chat, tokenizer, parse_special=True)
    )


def test_thinking_by_variable_and_by_command(tokenizer):
    thinking = with_template(tokenizer, THINKING)
    assert "<think>" in thinking.decode(render_chat(CHAT, thinking, enable_thinking=False))
    assert "<think>" not in thinking.decode(render_chat(CHAT, thinking, enable_thinking=True))
    # A template that knows no such variable: the models know the commands too, in the user's
    # words.
    for is_on, command in ((True, "/think"), (False, "/no_think")):
        commanded = [*CHAT[:3], {"role": "user", "content": f"{command} {CHAT[3]['content']}"}]
        assert render_chat(CHAT, tokenizer, enable_thinking=is_on) == render_chat(
            commanded, tokenizer
        )
    with pytest.raises(ValueError, match="puts /think before a user turn, but the chat has none"):
        render_chat(CHAT[:1], tokenizer, enable_thinking=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "cannot be read: Expected an expression"),
        ("{{ messages[0].content", "cannot be read"),
        (THINKING, "refuses this chat: a chat cannot begin with a tool"),
        ("{{ nowhere.field }}", "fails on this chat: UndefinedError: 'nowhere' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "fails on this chat: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "fails on this chat: SecurityError"),
        ("{% set _ = messages.append(1) %}", "fails on this chat: SecurityError"),
        ("{{ range(1000000000) }}", "fails on this chat: OverflowError"),
    ],
)
def test_bad_templates_are_one_clear_line(tokenizer, template, message):
    with pytest.raises(ValueError, match=message) as error:
        render_chat([{"role": "tool", "content": "x"}], with_template(tokenizer, template))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages is a str"),
        ([{"content": "x"}], r"messages\[0\] is"),
        ([{"role": 3}], "has role 3: it must be a string"),
        ([{"role": "user", "content": 5}], "has content 5: it must be a string"),
    ],
)
def test_malformed_messages(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(messages, tokenizer)


def test_the_built_in_template_has_no_switches(folder):
    (folder / "hy.tiktoken").write_bytes(
        b"".join(base64.b64encode(bytes([byte])) + b" 0\n" for byte in range(256))
    )
    built_in = load_tokenizer(folder / "hy.tiktoken")
    for name in ("enable_thinking", "add_generation_prompt", "tools"):
        with pytest.raises(ValueError, match=f"{name} has no effect without a chat template"):
            render_chat(CHAT, built_in, **{name: True})


@pytest.mark.filterwarnings("ignore:the chat template leaves out")
def test_labels_are_what_the_assistant_says(tokenizer):
    ids, labels = sft_example(
        [
            *CHAT[:3],
            {"role": "user", "content": "<|eos|>"},
            {"role": "assistant", "content": "Bye <|eos|>"},
        ],
        tokenizer,
    )
    said = [i for i in labels if i != IGNORED_LABEL]
    assert (
        tokenizer.decode(said) == "Hi.<|eos|>Bye <|eos|><|eos|>"
        and said.count(tokenizer.eos_id) == 2
    )
    assert all(label in (IGNORED_LABEL, i) for i, label in zip(ids, labels, strict=True))
    assert set(sft_example(CHAT[:2], tokenizer)[1]) == {IGNORED_LABEL}
    assert sft_example(CHAT[:3], tokenizer, max_len=4)[0] == ids[:4]
    forgetful = with_template(tokenizer, "{{ messages[-1].content }}")
    with pytest.raises(ValueError, match=r"messages\[2\] cannot be labelled"):
        sft_example(CHAT[:3], forgetful)


def test_a_system_prompt_that_the_template_adds_is_not_learned(tokenizer):
    """Before a chat that the assistant begins."""
    polite = with_template(
        tokenizer,
        "{% if messages[0].role != 'system' %}Be polite.<|extra_4|>{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|eos|>{% endfor %}",
    )
    chat = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "q"}]
    ids, labels = sft_example(chat, polite)
    assert polite.decode(ids) == "Be polite.<|extra_4|>assistant:Hi.<|eos|>user:q<|eos|>"
    assert polite.decode([i for i in labels if i != IGNORED_LABEL]) == "Hi.<|eos|>"


def test_a_role_that_the_template_leaves_out(tokenizer):
    chat = [*CHAT[:2], {"role": "critic", "content": "No."}]
    match = r"messages\[2\] has role 'critic', which .* it knows assistant, system, user: rename"
    with pytest.raises(ValueError, match=match):
        render_chat(chat, tokenizer)
    with pytest.raises(ValueError, match=r"messages\[0\] has role 'critic'"):
        render_chat(chat[2:], tokenizer)
    # An empty message loses nothing, and a template that takes any role is as good as ever.
    empty = [*CHAT[:2], {"role": "critic", "content": " "}]
    assert render_chat(empty, tokenizer, add_generation_prompt=False) == render_chat(
        CHAT[:2], tokenizer, add_generation_prompt=False
    )
    any_role = with_template(
        tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    assert any_role.decode(render_chat(chat, any_role)).endswith("critic: No.\n")
    # A template that knows a role may have its reasons: said, and rendered.
    known = with_template(
        tokenizer, "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    with pytest.warns(UserWarning, match=r"leaves out messages\[0\] of role 'system'"):
        assert known.decode(render_chat(CHAT[:2], known)) == "héllo 12"
