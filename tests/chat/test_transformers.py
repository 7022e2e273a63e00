"""Chats and labels are those of transformers."""

import copy
import json
import shutil

import pytest

from hunyuan_jax.chat.labels import IGNORED_LABEL, sft_example
from hunyuan_jax.chat.render import render_chat, said
from hunyuan_jax.tokenizer import load_tokenizer
from support import goldens, paths

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "get", "arguments": {"städte": ["Ulm", 1, 2.5, None, True], "role": "x"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": 'Gets "it" <b> \' ü',
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
]
CHATS = {
    "plain": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "héllo 12"},
        {"role": "assistant", "content": "<think>\nplan\n</think>\n\nHi."},
        {"role": "user", "content": "  more\n"},
        {"role": "assistant", "content": "<think>again</think>Bye e\u0301"},
    ],
    "null": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "assistant", "content": "7 degrees", "tool_calls": None},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
    ],
    "reasoning": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "because"},
    ],
}
TEMPLATES = {
    path.stem: path.read_text() for path in sorted((paths.GOLDEN / "templates").glob("*.jinja"))
} | {
    "parts": (
        "{% for m in messages %}<|startoftext|>{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}"
        "{% endfor %}{% endif %}<|eos|>{% endfor %}"
    ),
    "reasoning": (
        "{% for m in messages %}{{ m.thinking or '' }}/{{ m.reasoning_content | default('-') }}"
        "{{ m.content }}<|eos|>{% endfor %}{{ tools is none }}{{ documents is defined }}"
        "{{ '%s|%d' | format('x', 3) }}{{ messages | length ~ '<|pad|>' }}"
    ),
    "spans": (
        "{% macro turn(m) %}{% generation %}{{ m.content | trim }}<|eos|>{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{% if m.role == 'assistant' %}A:{{ turn(m) }}x"
        "{% generation %}é{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}<|extra_0|>{% endif %}{% endfor %}"
    ),
}
HY3_NAMES = [
    *(f"<｜{name}:opensource｜>" for name in ("hy_begin_of_sentence", "hy_User", "hy_Assistant")),
    *(f"<｜{name}:opensource｜>" for name in ("hy_eos", "reasoning_mode")),
    *(f"<{name}:opensource>" for name in ("think", "/think", "tool_calls", "/tool_calls")),
    *(f"<{name}:opensource>" for name in ("tool_call", "/tool_call", "tool_sep", "arg_key")),
]
HY3_CHATS = {
    "plain": [{"role": "system", "content": "Be "}, {"role": "system", "content": "brief."},
              {"role": "user", "content": " héllo 12\n"}],
    "thought": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "user", "content": "r"},
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "look"},
        {"role": "tool", "content": "7"},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "7 degrees"},
    ],
}  # fmt: skip
CASES = [
    ("tools", "plain"),
    ("tools", "null"),
    ("tools_ascii", "null"),
    ("think_split", "plain"),
    ("generation_tag", "plain"),
    ("parts", "plain"),
    ("parts", "parts"),
    ("reasoning", "plain"),
    ("reasoning", "reasoning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder whose <think> and </think> are special tokens."""
    folder, source = tmp_path_factory.mktemp("thinker"), goldens.folder_of("moe_top1")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(source / name, folder / name)
    text = (folder / "tokenizer.json").read_text()
    for was, name in (("<|extra_1|>", "<think>"), ("<|extra_2|>", "</think>")):
        assert text.count(was)
        text = text.replace(was, name)
    (folder / "tokenizer.json").write_text(text)
    return folder


@pytest.fixture
def both(folder):
    """(our tokenizer, theirs) with a template."""

    def build(name):
        ours = copy.copy(load_tokenizer(folder))
        ours.chat_template = TEMPLATES[name]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.chat_template = TEMPLATES[name]
        return ours, theirs

    return build


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_ids_are_theirs(both, name, chat):
    ours, theirs = both(name)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(CHATS[chat], tools=tools, return_dict=False)
        found = render_chat(
            CHATS[chat], ours, parse_special=True, add_generation_prompt=False, tools=tools
        )
        assert found == expected
    # Without token names in the messages parse_special changes nothing.
    if "<think>" not in json.dumps(CHATS[chat]):
        assert found == render_chat(CHATS[chat], ours, add_generation_prompt=False, tools=TOOLS)


@pytest.fixture(scope="module", params=[":opensource", ""])
def hy3(request, tmp_path_factory):
    """(our tokenizer, theirs) with Hy3's tokens and a template of its constructs, in both
    spellings of their names.
    """
    folder, source = tmp_path_factory.mktemp("hy3"), goldens.folder_of("moe_top1")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(source / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    first = max(first, 1 + max(tokenizer["model"]["vocab"].values()))
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][0] | {"id": first + i, "content": _spelled(name, request.param)}
        for i, name in enumerate(HY3_NAMES)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours.chat_template = theirs.chat_template = _spelled(TEMPLATES["hy3"], request.param)
    return ours, theirs


def _spelled(text, suffix):
    return text.replace(":opensource", suffix)


@pytest.mark.parametrize("chat", HY3_CHATS)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "low", "tools": TOOLS},
        {"is_training": True},
        {"preserved_thinking": True},
    ],
    ids=str,
)
def test_ids_of_hy3s_constructs_are_theirs(hy3, chat, variables):
    ours, theirs = hy3
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            HY3_CHATS[chat], add_generation_prompt=prompt, return_dict=False, **variables
        )
        found = render_chat(HY3_CHATS[chat], ours, add_generation_prompt=prompt, **variables)
        assert found == expected
    first = next(name for name in ours.special_names if "hy_begin_of_sentence" in name)
    assert found[0] == ours.special_id(first)


@pytest.mark.parametrize("name", ["generation_tag", "spans"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_labels_by_tags_are_theirs(both, name, parse_special):
    ours, theirs = both(name)
    chat = copy.deepcopy(CHATS["plain"])
    if not parse_special:  # otherwise the ids are not theirs
        for message in chat:
            message["content"] = message["content"].replace("think", "thought")
    ids, labels = sft_example(chat, ours, parse_special=parse_special)
    expected = theirs.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == expected["input_ids"]
    masked = zip(ids, expected["assistant_masks"], strict=True)
    assert labels == [i if is_learned else IGNORED_LABEL for i, is_learned in masked]
    assert 0 < sum(expected["assistant_masks"]) < len(ids)


def test_a_chat_with_thoughts_is_remembered_as_they_render_it(both):
    """What the model wrote as tokens is tokens again, or is left out as the template says."""
    for name in ("think_split", "generation_tag"):
        ours, theirs = both(name)
        wrote = "<think>\nplan é\n</think>\n\nHi."
        ids = theirs.encode(wrote, add_special_tokens=False)
        assert ours.special_id("<think>") in ids and ours.special_id("</think>") in ids
        content = said(ids, ours)
        assert content == wrote
        chat = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "r"},
        ]
        expected = theirs.apply_chat_template(chat, return_dict=False)
        assert render_chat(chat, ours, add_generation_prompt=False) == expected
        # What somebody typed, or copied from JSON, is text; the template cuts it all the same.
        typed = json.loads(json.dumps(chat))
        found = render_chat(typed, ours, add_generation_prompt=False)
        assert ours.special_id("<think>") not in found
        assert ours.decode(found) == ours.decode(expected)
