"""Tokenizers: equality with the official class, the laws of encode and decode, and every message a
user can meet.
"""

import base64
import json
import pathlib
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hunyuan_jax.tokenizer import ByteTokenizer, HyTokenizer, StreamDecoder, load_tokenizer
from hunyuan_jax.tokenizer.hy import MAX_BLANK_RUN, SPECIAL_TOKENS
from support import paths

GOLDEN = json.loads(
    (paths.GOLDEN / "large/tokenizer/tokenizer_golden.json").read_text(encoding="utf-8")
)
REAL_RANKS = paths.SHARED / "data/hy.tiktoken"
BYTES = [bytes([byte]) for byte in range(256)]
MERGES = [
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" hello",
    b"12",
    b"  ",
    "\u6d77".encode()[:2],
    "\u6d77".encode(),
    b"<|",
    b"|>",
]

SETTINGS = settings(derandomize=True, database=None, max_examples=80)
VALID_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# Text in which names of special tokens, or what nearly is one, are common.
TRICKY_TEXT = st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS[:6], "<|extra_204|>", "<|", "|>", "eos", "hello 12", "e\u0301", "\u0338"]
    )
    | VALID_TEXT
).map("".join)


def write_ranks(path: pathlib.Path, tokens: list[bytes]) -> pathlib.Path:
    """Write a ranks file whose rank column is useless, as it is to be ignored."""
    path.write_bytes(b"".join(base64.b64encode(token) + b" 7\n" for token in tokens))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> HyTokenizer:
    """The real class on 267 ranks."""
    return HyTokenizer(
        write_ranks(tmp_path_factory.mktemp("ranks") / "tiny.tiktoken", BYTES + MERGES)
    )


@pytest.fixture(scope="module", params=["byte", "tiny"])
def tokenizer(request, tiny):
    """Each tokenizer that needs no outside file."""
    return {"byte": ByteTokenizer(), "tiny": tiny}[request.param]


@pytest.fixture(scope="module")
def real() -> HyTokenizer:
    """The released ranks, which are not ours to distribute."""
    if not REAL_RANKS.is_file():
        pytest.skip(
            "the released ranks file is not beside the checkout (../shared/data/hy.tiktoken)"
        )
    return HyTokenizer(REAL_RANKS)


# --- Against the official class
# ---------------------------------------------------------------------------------------


def test_real_sizes_and_ids_match_official(real):
    assert real.vocab_size == GOLDEN["n_vocab"]
    assert len(SPECIAL_TOKENS) == GOLDEN["special_tokens"]
    assert {name: real.special_id(name) for name in GOLDEN["ids"]} == GOLDEN["ids"]
    assert (real.bos_id, real.eos_id, real.pad_id) == (
        GOLDEN["bos_token_id"],
        GOLDEN["eos_token_id"],
        GOLDEN["pad_token_id"],
    )
    assert real.stop_ids == (GOLDEN["ids"]["<|eos|>"], GOLDEN["ids"]["<|extra_5|>"])


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: ascii(case["text"])[:30])
def test_real_text_matches_official(real, case):
    ids = real.encode(case["text"], parse_special=True)
    assert ids == case["ids"]
    assert [real.bos_id, *ids, real.eos_id] == case["ids_with_special"]
    assert real.decode(ids) == case["decoded"]
    assert real.decode(ids, skip_special=True) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: ascii(case["text"])[:30])
def test_tiny_decodes_to_official_text(tiny, case):
    ids = tiny.encode(case["text"], parse_special=True)
    assert tiny.decode(ids) == case["decoded"]
    assert tiny.decode(ids, skip_special=True) == case["decoded_skip_special"]


def test_real_round_trip_of_every_ordinary_token(real):
    # Token by token: no rank is lost, shifted or doubled between the file and the table.
    lines = REAL_RANKS.read_bytes().splitlines()
    assert [base64.b64encode(real.decode_bytes([rank])) for rank in range(len(lines))] == [
        line.split()[0] for line in lines
    ]


# --- Splitting and merging
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        ["I", "'m"],
        ["'s", "a", "'t", "a", "'re", "a", "'ve", "a", "'m", "a", "'ll", "a", "'d", "a"],
        ["'S", "A", "'T", "a", "'RE", "A", "'vE", "a", "'M", "A", "'Ll", "a", "'D", "A"],
        ["don", "'T", " x"],
        ["1", "2", "3"],
        ["a", "1", "b"],
        [" ", "1", "2"],
        ["a", " b", "\tc"],
        ["a", "\n", "b"],
        ["(x", ")"],
        ["a", " !?", " b"],
        ["x", ";\n\n", "y"],
        ["a", "\r\n", "b"],
        ["a", " \n \n", "  ", " b"],
        ["a", "  ", " b"],
        ["a", "   "],
        ["a", "\t", "\t", "1"],
        ["\u6d77\u6c34", "\u3002"],
        ["\u0660", "\u0661"],
    ],
    ids=ascii,
)
def test_text_is_split_as_the_pattern_says(tmp_path, pieces):
    # Neighbours joined are tokens too, so where the pattern fails to split they come out as one.
    spans = [
        "".join(pieces[start:end])
        for start in range(len(pieces))
        for end in range(start + 1, len(pieces) + 1)
    ]
    tokens = list(dict.fromkeys([*BYTES, *(span.encode() for span in spans)]))
    ranks = HyTokenizer(write_ranks(tmp_path / "ranks", tokens))
    assert ranks.encode("".join(pieces)) == [tokens.index(piece.encode()) for piece in pieces]


def test_merges_follow_line_order_not_the_rank_column(tmp_path):
    first = HyTokenizer(write_ranks(tmp_path / "first", [*BYTES, b"ab", b"bc"]))
    second = HyTokenizer(write_ranks(tmp_path / "second", [*BYTES, b"bc", b"ab"]))
    assert first.encode("abc") == [256, ord("c")]
    assert second.encode("abc") == [ord("a"), 256]


def test_special_ids_follow_the_last_rank(tiny):
    assert [tiny.special_id(name) for name in SPECIAL_TOKENS] == list(range(267, 267 + 209))
    assert tiny.vocab_size == 267 + 209
    assert (tiny.eos_id, tiny.bos_id, tiny.pad_id, tiny.stop_ids) == (267, 268, 271, (270, 277))


def test_text_is_composed_before_it_is_split(tiny):
    assert tiny.encode("e\u0301") == list("\u00e9".encode())
    # Composition comes first in the official class too: here it takes the ">" away, and with it
    # the token.
    assert tiny.special_id("<|eos|>") not in tiny.encode("<|eos|>\u0338", parse_special=True)


# --- Laws
# -----------------------------------------------------------------------------


@SETTINGS
@given(text=VALID_TEXT | TRICKY_TEXT, parse_special=st.booleans())
def test_hy_decode_inverts_encode_up_to_nfc(tiny, text, parse_special):
    assert tiny.decode(tiny.encode(text, parse_special=parse_special)) == unicodedata.normalize(
        "NFC", text
    )


@SETTINGS
@given(text=VALID_TEXT | TRICKY_TEXT, parse_special=st.booleans())
def test_byte_decode_inverts_encode(text, parse_special):
    byte = ByteTokenizer()
    assert byte.decode(byte.encode(text, parse_special=parse_special)) == text


@SETTINGS
@given(text=TRICKY_TEXT)
@example(text="".join(SPECIAL_TOKENS))
def test_plain_text_never_gives_a_special_id(tokenizer, text):
    first_special = min(tokenizer.bos_id, tokenizer.eos_id)
    assert all(0 <= token_id < first_special for token_id in tokenizer.encode(text))


@SETTINGS
@given(text=st.text() | TRICKY_TEXT)
def test_the_array_of_a_text_is_its_list(tokenizer, text):
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_fingerprint_changes_with_tokens_and_rules(tmp_path, tiny):
    same = HyTokenizer(write_ranks(tmp_path / "same", BYTES + MERGES))
    swapped = HyTokenizer(write_ranks(tmp_path / "swapped", [*BYTES, *reversed(MERGES)]))
    joined = HyTokenizer(
        write_ranks(tmp_path / "joined", [*BYTES, *MERGES[:-1], MERGES[-1] + b"<"])
    )
    assert tiny.fingerprint() == same.fingerprint()
    other_rules = type("HyTokenizer", (HyTokenizer,), {"_rules": ("NFC", "x")})(tmp_path / "same")
    assert (
        len({each.fingerprint() for each in (tiny, swapped, joined, ByteTokenizer(), other_rules)})
        == 5
    )


@SETTINGS
@given(
    names=st.lists(
        st.sampled_from(["<|bos|>", "<|eos|>", "<|pad|>", "hello ", "12", "<|", "\u6d77"])
    )
)
def test_parsed_names_become_their_ids_in_place(tokenizer, names):
    ids = tokenizer.encode("".join(names), parse_special=True)
    specials = {tokenizer.special_id(name): name for name in ("<|bos|>", "<|eos|>", "<|pad|>")}
    assert [specials[token_id] for token_id in ids if token_id in specials] == [
        name for name in names if name in specials.values()
    ]
    assert tokenizer.decode(ids, skip_special=True) == "".join(
        name for name in names if name not in specials.values()
    )


@SETTINGS
@given(data=st.data(), skip_special=st.booleans())
def test_streamed_text_is_the_decoded_text(tokenizer, data, skip_special):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3) | st.integers(0x80, 0xFF)))
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    for _ in range(2):  # finish() leaves the decoder as new
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(
            ids, skip_special=skip_special
        )


@SETTINGS
@given(text=VALID_TEXT)
def test_stream_gives_each_character_when_complete_and_not_before(text):
    byte, pushed = ByteTokenizer(), []
    stream = StreamDecoder(byte)
    for character in text:
        *inner, last = [stream.push(token_id) for token_id in byte.encode(character)]
        assert inner == [""] * len(inner)
        pushed.append(last)
    assert pushed == list(text)
    assert stream.finish() == ""


def test_stream_that_ends_inside_a_character_shows_one_replacement():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(byte) for byte in "\u6d77".encode()[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


# --- Edges
# -----------------------------------------------------------------------------


def test_byte_ids():
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.bos_id, byte.eos_id, byte.pad_id, byte.stop_ids) == (
        259,
        256,
        257,
        258,
        (257,),
    )
    assert byte.encode("a\u00e9<|eos|>") == list("a\u00e9<|eos|>".encode())
    assert byte.encode("a<|eos|>b", parse_special=True) == [97, 257, 98]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\ud83db", "a\ufffdb"), ("\udc00\ud83d", "\ufffd\ufffd")],
    ids=["one", "swapped pair"],
)
def test_lone_surrogate_becomes_the_replacement_character(tokenizer, text, shown):
    assert tokenizer.decode(tokenizer.encode(text)) == shown


def test_surrogate_pairs_are_encoded_as_the_characters_they_stand_for(tokenizer):
    # The second text is one that NFC composes, so the pairs must be joined before that.
    for text, joined in (
        ("\ud83d\ude42", "\U0001f642"),
        ("\ud804\udc99\ud804\udcba", "\U00011099\U000110ba"),
    ):
        assert tokenizer.encode(text) == tokenizer.encode(joined)


@pytest.mark.cases(1)
@pytest.mark.parametrize("parse_special", [False, True])
def test_blank_runs_that_abort_the_regex_engine_are_encoded(tiny, parse_special):
    blanks = [
        chr(code)
        for code in range(0x3001)
        if chr(code).isspace() and chr(code) not in "\r\n\x1c\x1d\x1e\x1f"
    ]
    every_blank = unicodedata.normalize("NFC", "".join(blanks) * (1_100_000 // len(blanks)))
    assert len(every_blank) > 1_000_000 > MAX_BLANK_RUN
    text = "hello" + every_blank + "hello" + every_blank
    assert tiny.decode(tiny.encode(text, parse_special=parse_special)) == text


def test_long_text_without_long_blank_runs_is_not_cut(tiny):
    text = "hello" + " " * MAX_BLANK_RUN + "hello"
    # All blanks but the last are one run, merged in pairs; the last one belongs to the word.
    hello, pair, spaced_hello = (
        256 + MERGES.index(token) for token in (b"hello", b"  ", b" hello")
    )
    assert tiny.encode(text) == [hello, *[pair] * (MAX_BLANK_RUN // 2 - 1), ord(" "), spaced_hello]


def test_ids_past_the_vocabulary_show_as_replacement_and_count_as_special(tokenizer):
    ids = [104, tokenizer.vocab_size, 105, tokenizer.vocab_size + 1000]
    assert tokenizer.decode(ids) == "h\ufffdi\ufffd"
    assert tokenizer.decode(ids, skip_special=True) == "hi"


def test_decode_takes_integer_arrays(tokenizer):
    ids = tokenizer.encode("hello 12")
    assert (
        tokenizer.decode(np.asarray(ids, np.int32)) == tokenizer.decode(tuple(ids)) == "hello 12"
    )
    assert StreamDecoder(tokenizer).push(np.int32(104)) == "h"
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])


def test_negative_id_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match="token id -100 cannot be decoded: ids start at 0; remove"
    ):
        tokenizer.decode([1, -100])


def test_unknown_special_name_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"special token '<\|extra_204\|>' is unknown.*use one of them"
    ):
        tokenizer.special_id("<|extra_204|>")


def test_tokenizers_survive_pickling(tokenizer):
    # Loader workers receive the tokenizer this way.
    text = "hello 12 <|eos|> \u6d77"
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(text, parse_special=True) == tokenizer.encode(text, parse_special=True)
    assert copy.stop_ids == tokenizer.stop_ids


# --- Loading
# -----------------------------------------------------------------------------


def test_load_by_name_and_by_path(tmp_path, tiny):
    path = write_ranks(tmp_path / "ranks", BYTES + MERGES)
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    assert (
        load_tokenizer(str(path)).encode("hello")
        == load_tokenizer(path).encode("hello")
        == tiny.encode("hello")
        == [259]
    )


@pytest.mark.parametrize("make", [load_tokenizer, HyTokenizer])
def test_missing_file_or_folder_is_one_clear_line(tmp_path, make):
    for path in (tmp_path / "none.tiktoken", tmp_path):
        message = r"is not a file: it must be 'byte' or a ranks file.*; give the path"
        if make is load_tokenizer and path.is_dir():
            message = r"holds no tokenizer: neither tokenizer\.json nor hy\.tiktoken"
        with pytest.raises(ValueError, match=message) as error:
            make(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad_line",
    [
        b"",
        b"QUI=",
        b"QUI= 256 1",
        b"QU! 256",
        b"QUI 256",
        b"\xff\xfe 256",
        b"version https://example.invalid/spec/v1",
        b"x" * 500,
    ],
    ids=ascii,
)
def test_malformed_line_is_named(tmp_path, bad_line):
    path = write_ranks(tmp_path / "ranks", BYTES)
    path.write_bytes(path.read_bytes() + bad_line + b"\nQUI= 257\n")
    with pytest.raises(
        ValueError, match=r"ranks, line 257: .* is not 'BASE64 RANK'; get the file again"
    ) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 200


def test_repeated_token_is_named_with_both_lines(tmp_path):
    path = write_ranks(tmp_path / "ranks", [*BYTES, b"ab", b"bc", b"ab"])
    with pytest.raises(ValueError, match=r"line 259: 'YWI= 7' repeats the token of line 257"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("tokens", "count", "first"), [([], 256, "0x00"), (BYTES[:-1], 1, "0xff")]
)
def test_ranks_without_every_byte_are_refused(tmp_path, tokens, count, first):
    with pytest.raises(
        ValueError, match=rf"{count} of the 256 single bytes have no rank \(first: {first}\)"
    ):
        load_tokenizer(write_ranks(tmp_path / "ranks", tokens))


def test_crlf_ranks_file_reads_the_same(tmp_path, tiny):
    path = write_ranks(tmp_path / "ranks", BYTES + MERGES)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(path).encode("hello 12") == tiny.encode("hello 12")


def loaded_modules(code: str, *arguments: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `code`, with every network connection
    refused.
    """
    no_network = (
        "import socket, sys\ndef refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    report = "\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", no_network + code + report, *arguments]
    return set(
        subprocess.run(
            command, cwd=paths.ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_bytes_load_neither_jax_nor_tiktoken():
    modules = loaded_modules(
        "from hunyuan_jax.tokenizer import load_tokenizer\nload_tokenizer('byte').encode('hello')"
    )
    assert "hunyuan_jax" in modules
    assert modules.isdisjoint({"jax", "tiktoken", "numpy", "requests"})


def test_ranks_load_tiktoken_without_network(tmp_path):
    path = write_ranks(tmp_path / "ranks", BYTES + MERGES)
    modules = loaded_modules(
        "from hunyuan_jax.tokenizer import "
        "load_tokenizer\nload_tokenizer(sys.argv[1]).encode('hello')",
        str(path),
    )
    assert "tiktoken" in modules and "jax" not in modules
