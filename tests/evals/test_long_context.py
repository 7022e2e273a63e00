"""RULER and needles over lengths and depths: with a reader that knows the answers, and with a
small model.
"""

import re

from hunyuan_jax.evals import long_context, ruler, tables
from hunyuan_jax.evals.answers import Failed
from hunyuan_jax.evals.long_context import Run
from hunyuan_jax.tokenizer import ByteTokenizer


class Reader:
    """Answers by looking the needles up; stands where a model stands, with bytes as tokens.

    blind: the share of the text, from its beginning, that it does not see.
    """

    max_length = 10**6

    def __init__(self, blind=0.0):
        self.lm, self.blind, self.num_tokens = self, blind, []
        self.tokenizer = ByteTokenizer()

    def texts(self, prompts, on_done):
        found = []
        for place, prompt in enumerate(prompts):
            text = self.tokenizer.decode(prompt.ids)
            self.num_tokens.append(len(prompt.ids) + prompt.sampling.max_new_tokens)
            asked = text.rsplit(" for ", 1)[1].split(" mentioned")[0]
            seen = text[int(self.blind * len(text)) :]
            values = [
                value
                for key, value in re.findall(r"for ([\w-]+) is: ([\w-]+)\.", seen)
                if key in re.split(r", and |, ", asked)
            ]
            assert self.blind or prompt.is_done(" ".join(values))
            found.append(" ".join(values) if "xyzzy" not in text else Failed("it is broken"))
            on_done(place)
        return found


LENGTHS = [2000, 4000]


def test_who_reads_everything_finds_every_needle():
    reader, done = Reader(), []
    run = Run(reader, 3, on_done=lambda: done.append(1))
    found = long_context.run_ruler(run, list(ruler.NEEDLE_TASKS), LENGTHS)
    assert all(row == {2000: 100, 4000: 100} for row in found["scores"].values())
    assert found["mean"] == {2000: 100, 4000: 100} and found["failed"] == []
    assert len(done) == 8 * 2 * 3
    for num in reader.num_tokens:
        assert any(length - 200 <= num <= length for length in LENGTHS)


def test_who_reads_the_second_half_finds_deep_needles():
    run = Run(Reader(blind=0.5), 2)
    found = long_context.run_needles(run, long_context.NEEDLE, LENGTHS, [0, 20, 80, 100])
    for length in LENGTHS:
        assert found["scores"][length] == {0: 0, 20: 0, 80: 100, 100: 100}
    assert found["mean"] == {2000: 50, 4000: 50} and found["needles"] == 1
    by_depth = long_context.run_ruler(Run(Reader(0.5), 20), ["niah_single_2"], [4000])["by_depth"]
    assert by_depth[4000]["0-20"] == 0 and by_depth[4000]["80-100"] == 100


def test_several_needles_lie_between_the_depth_and_the_end():
    run = Run(Reader(blind=0.5), 1)
    found = long_context.run_needles(run, long_context.MULTI_NEEDLE, [4000], [0, 60])
    # At 0, 25, 50 and 75 percent; then at 60, 70, 80 and 90.
    assert found["scores"][4000][60] == 100 and found["scores"][4000][0] in (25, 50)
    assert found["needles"] == 4


def test_lengths_without_room_are_named_once():
    found = long_context.run_ruler(Run(Reader(), 3), ["niah_single_2"], [300, 2000])
    (line,) = found["failed"]
    assert "niah_single_2 needs at least" in line and "length 300 is too short" in line
    assert found["scores"]["niah_single_2"] == {2000: 100} and found["mean"] == {2000: 100}


def test_a_sample_that_fails_leaves_the_others():
    run = Run(Reader(), 2, text=["It was xyzzy."])
    found = long_context.run_ruler(run, ["niah_single_1", "niah_single_2"], [2000])
    assert found["scores"] == {"niah_single_1": {2000: 100}, "niah_single_2": {}}
    assert found["failed"] == ["niah_single_2, length 2000: it is broken"] * 2
    assert found["mean"] == {}  # of all tasks or none


def test_prompts_of_chats_fit_too(lm):
    class Chats(Reader):
        def __init__(self):
            super().__init__()
            self.tokenizer = lm.tokenizer

        def chat_ids(self, messages):
            return lm.chat_ids(messages)

    reader = Chats()
    found = long_context.run_ruler(Run(reader, 2, is_chat=True), ["niah_single_2"], [3000])
    assert found["mean"] == {3000: 100}
    assert max(reader.num_tokens) <= 3000
    begin = reader.tokenizer.bos_id
    assert Run(reader, 1, is_chat=True).ids("a", " b")[0] == begin
    assert Run(reader, 1, add_bos=True).ids("a", " b")[0] == begin
    assert Run(reader, 1).ids("a", " b")[0] != begin


def test_tables_show_lengths_beside_each_other():
    run = Run(Reader(blind=0.5), 1)
    needles = long_context.run_needles(run, long_context.NEEDLE, LENGTHS, [0, 100])
    assert tables.table("needle", {**needles, "seconds": 1.0}).splitlines()[1:] == [
        "needle, 1.0 s",
        "| depth | 2000  | 4000  |",
        "|-------|-------|-------|",
        "| 0     | 0.0   | 0.0   |",
        "| 100   | 100.0 | 100.0 |",
        "| mean  | 50.0  | 50.0  |",
    ]
    of_ruler = long_context.run_ruler(run, ["niah_single_1", "niah_single_2"], LENGTHS)
    shown = tables.table("ruler", {**of_ruler, "seconds": 1.0})
    assert "| task          | 2000" in shown and "| mean " in shown and "by depth" in shown
