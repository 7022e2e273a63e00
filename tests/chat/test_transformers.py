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
