"""Pages and plans, without a device: a stand-in keeps the tokens that each page would hold, so
that a page that is shared, reused or written at the wrong time is seen.
"""

import collections
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.infer.pages import Pages, page_hashes
from hunyuan_jax.infer.request import Request
from hunyuan_jax.infer.scheduler import Choice, Drawn, DrawnRows, Scheduler, Shapes
from hunyuan_jax.infer.settings import Sampling

SIZE = 4
SHAPES = Shapes(page_size=SIZE, piece=4, num_pieces=(1, 3), rows=3, max_steps=8)
INVARIANT = SHAPES._replace(num_pieces=(1,))


def next_token(tokens, seed):
    """What the stand-in draws: it depends on all tokens."""
    return hashlib.sha256(repr((tokens, seed)).encode()).digest()[0] % 8


class Device:
    """Pages of tokens.  Runs plans as the programs do, each when it is dispatched."""

    def __init__(self, num_pools, step_tokens=1):
        self.step_tokens = step_tokens
        self.pages = [collections.defaultdict(dict) for _ in range(num_pools)]
        self.rows = {}

    def write(self, choice, position, token, pages):
        if position // SIZE < len(pages):
            self.pages[choice.pool][pages[position // SIZE]][position % SIZE] = token

    def held(self, choice, length, pages):
        pool = self.pages[choice.pool]
        return [pool[pages[i // SIZE]].get(i % SIZE) for i in range(length)]

    def draw(self, choice, row, pages):
        """One token of a row; the newest one goes into the cache first."""
        self.write(choice, len(row["tokens"]) - 1, row["tokens"][-1], pages)
        assert self.held(choice, len(row["tokens"]), pages) == row["tokens"]
        token = next_token(row["tokens"], choice.request.sampling.seed)
        row["tokens"].append(token)
        drawn = len(row["tokens"]) - choice.num_prompt
        row["is_done"] = drawn >= choice.max_new or token in row["stops"]
        return token

    def run(self, plan):
        of_chunks, of_rows = [], []
        for chunk in plan.chunks:
            choice, pages = chunk.choice, chunk.choice.pages
            tokens = choice.tokens[: chunk.end]
            for i in range(chunk.start, chunk.end):
                self.write(choice, i, tokens[i], pages)
            drawn = []
            if chunk.is_last:
                # The stand-in knows one stop id fewer than the request, as a device may.
                stops = choice.request.sampling.stop_ids[:1]
                row = {"tokens": tokens[:-1], "is_done": False, "stops": stops}
                row["tokens"].append(tokens[-1])
                self.rows[choice.pool, choice.row] = row
                drawn.append(self.draw(choice, row, pages))
            of_chunks.append(Drawn(drawn))
        choices = [choice for rows in plan.rows for choice in rows.choices]
        made = {choice: [] for choice in choices}
        rows = [self.rows[choice.pool, choice.row] for choice in choices]
        was_done = [row["is_done"] for row in rows]
        for _ in range(plan.num_steps):
            ended = any(
                row["is_done"] and not was for row, was in zip(rows, was_done, strict=True)
            )
            if plan.ends_early and ended:
                break
            for choice, row in zip(choices, rows, strict=True):
                made[choice] += self.draw_step(choice, row)
        of_rows = [
            DrawnRows([made[c] for c in choices], [None] * len(choices), [0] * len(choices))
            for choices, _, _ in plan.rows
        ]
        return of_chunks, of_rows

    def draw_step(self, choice, row):
        """One token and those that drafts allow, as far as the row and its pages go; the entries
        of the other drafts are junk.
        """
        first, drawn = len(row["tokens"]), []
        num_right = next_token(row["tokens"], "drafts") % self.step_tokens
        while not row["is_done"] and len(row["tokens"]) <= len(choice.pages) * SIZE:
            drawn.append(self.draw(choice, row, choice.pages))
            if len(drawn) > num_right:
                break
        if drawn:
            for position in range(len(row["tokens"]) - 1, first - 1 + self.step_tokens):
                self.write(choice, position, -1, choice.pages)
        return drawn


def expected(request):
    tokens, answer = list(request.tokens), []
    while len(answer) < request.sampling.max_new_tokens:
        answer.append(next_token(tokens + answer, request.sampling.seed))
        if answer[-1] in request.sampling.stop_ids:
            break
    return answer


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 20),  # tokens of the prompt
        st.integers(0, 2),  # which of three texts it begins
        st.integers(1, 12),  # new tokens
        st.sampled_from([(), (3,), (3, 5)]),
        st.integers(0, 6),  # the step at which it arrives
        st.sampled_from([None, None, None, 2, 5]),  # steps until it is aborted
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150)
@given(
    REQUESTS,
    st.integers(1, 2),
    st.integers(8, 20),
    st.booleans(),
    st.sampled_from([1, 1, 3]),
    st.sampled_from([2, 4]),
)
def test_every_trace_gives_the_tokens_of_each_request_alone(
    trace, num_pools, num_pages, is_invariant, step_tokens, piece
):
    texts = [[(i * (text + 2)) % 7 for i in range(20)] for text in range(3)]
    pools = [Pages(num_pages) for _ in range(num_pools)]
    shapes = INVARIANT if is_invariant else SHAPES._replace(piece=piece)
    shapes = shapes._replace(step_tokens=step_tokens)
    scheduler = Scheduler(pools, shapes, is_invariant)
    device = Device(num_pools, step_tokens)
    choices, answers, reasons, under_way = [], {}, {}, collections.deque()

    def take(outputs):
        for output in outputs:
            answers[output.id] += output.tokens
            reasons[output.id] = output.finish_reason or reasons.get(output.id)

    for number, (length, text, max_new, stop_ids, *_) in enumerate(trace):
        sampling = Sampling(max_new_tokens=max_new, stop_ids=stop_ids, seed=text).resolved({})
        request = Request(str(number), tuple(texts[text][:length]), sampling)
        choices.append(Choice(request, 0, max_new))
        answers[request.id] = []
    for step in range(2000):
        for choice, (*_, arrival, patience) in zip(choices, trace, strict=True):
            if arrival == step:
                scheduler.add(choice)
            if patience is not None and step == arrival + patience:
                output = scheduler.abort(choice)
                take([output] if output else [])
        plan = scheduler.plan()
        if plan is not None:
            under_way.append((plan, *device.run(plan)))
        if len(under_way) > (plan is not None):
            take(scheduler.update(*under_way.popleft()))
        if not under_way:
            scheduler.settle()
        for pages in pools:
            assert pages.num_used + pages.num_available == num_pages
        if step > 6 and not (scheduler.running or scheduler.waiting or under_way):
            break
    else:
        raise AssertionError("the trace does not end")
    assert all(pages.num_used == 0 for pages in pools)
    for choice in choices:
        whole = expected(choice.request)
        if reasons[choice.request.id] == "abort":
            assert answers[choice.request.id] == whole[: len(answers[choice.request.id])]
        else:
            assert answers[choice.request.id] == whole
            is_stop = whole[-1] in choice.request.sampling.stop_ids
            assert reasons[choice.request.id] == ("stop" if is_stop else "length")


def scheduled(num_pages=40, shapes=SHAPES, num_pools=1, **options):
    pools = [Pages(num_pages) for _ in range(num_pools)]
    return pools[0], Scheduler(pools, shapes, **options), Device(num_pools)


def finish(scheduler, device):
    outputs = []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        if plan is not None:
            outputs += scheduler.update(plan, *device.run(plan))
        scheduler.settle()
    return outputs


def request(tokens, max_new=3, **options):
    sampling = Sampling(max_new_tokens=max_new, stop_ids=()).resolved({})
    return Choice(Request("r", tuple(tokens), sampling, **options), 0, max_new)


def test_a_prompt_finds_the_pages_of_the_same_beginning_and_salt():
    pages, scheduler, device = scheduled()
    for tokens, salt, num_found in (
        (range(14), "", 0),
        (range(14), "", 12),
        (range(12), "", 8),  # the last token is computed in any case
        ([*range(8), 1, 2, 3], "", 8),
        (range(14), "mine", 0),
        (range(14), "mine", 12),
    ):
        before = scheduler.num_found
        scheduler.add(request(tokens, cache_salt=salt))
        finish(scheduler, device)
        assert scheduler.num_found - before == num_found
    assert pages.num_used == 0 and pages.num_cached > 0


def test_samples_of_a_prompt_share_its_pages():
    pages, scheduler, device = scheduled()
    for _ in range(3):
        scheduler.add(request(range(17)))
    most = 0
    while (plan := scheduler.plan()) is not None:
        most = max(most, pages.num_used)
        scheduler.update(plan, *device.run(plan))
    assert scheduler.num_found == 2 * 16
    assert most == 4 + 3  # four full pages for all, and the rest of each


def test_the_page_that_is_unused_longest_is_taken_first():
    pages = Pages(4)
    names = page_hashes(range(16), SIZE, "")
    taken = pages.take(4)
    for page, name in zip(taken, names, strict=True):
        pages.name(page, name)
    pages.release(taken[2:], 1)
    pages.release(taken[:2], 2)
    pages.settle(2)
    assert pages.num_cached == pages.num_available == 4
    assert pages.take(1) == [taken[3]]
    assert pages.num_known(names) == 3
    assert pages.take(5) is None


def test_a_page_is_not_free_before_the_last_step_that_may_write_it_is_back():
    pages = Pages(2)
    taken = pages.take(2)
    pages.release(taken, 7)
    pages.settle(6)
    assert pages.num_available == 0 and pages.has_leaving
    pages.settle(7)
    assert pages.num_available == 2


def test_running_prompts_and_rows_share_a_step():
    _, scheduler, device = scheduled()
    scheduler.add(request(range(4)))
    scheduler.update(*(lambda plan: (plan, *device.run(plan)))(scheduler.plan()))
    scheduler.add(request(range(20, 36)))
    plan = scheduler.plan()
    assert [(chunk.start, chunk.end) for chunk in plan.chunks] == [(0, 4), (4, 8), (8, 12)]
    assert len(plan.rows[0].choices) == 1 and plan.num_steps == 1


def test_a_call_has_as_many_steps_as_its_rows_may():
    _, scheduler, device = scheduled()
    scheduler.max_steps = {1: 8, 2: 2}.get
    scheduler.add(request(range(4), max_new=30))
    scheduler.update(*(lambda plan: (plan, *device.run(plan)))(scheduler.plan()))
    plan = scheduler.plan()
    assert plan.num_steps == 8
    scheduler.update(plan, *device.run(plan))
    scheduler.add(request(range(20, 24), max_new=30))
    scheduler.update(*(lambda plan: (plan, *device.run(plan)))(scheduler.plan()))
    assert scheduler.plan().num_steps == 2


@pytest.mark.parametrize(
    ("num_tokens", "num_chunks"), [(4, [1]), (8, [2]), (12, [3]), (16, [3, 1]), (28, [3, 3, 1])]
)
@pytest.mark.parametrize("num_pools", [1, 2])
def test_a_call_takes_the_number_of_pieces_that_is_computed_fastest(
    num_tokens, num_chunks, num_pools
):
    """One prompt is in one pool."""
    _, scheduler, device = scheduled(num_pools=num_pools)
    scheduler.add(request(range(num_tokens)))
    found = []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        found += [len(plan.chunks)] * bool(plan.chunks)
        scheduler.update(plan, *device.run(plan))
    assert found == num_chunks


@pytest.mark.parametrize(("overhead", "num_chunks"), [(1, 2), (8, 5)])
def test_a_call_that_costs_much_itself_takes_more_pieces(overhead, num_chunks):
    """Five pieces are left; calls take one, two, or eight, of which three would be padding."""
    shapes = SHAPES._replace(num_pieces=(1, 2, 8), overhead=overhead)
    _, scheduler, _ = scheduled(shapes=shapes)
    scheduler.add(request(range(20)))
    assert len(scheduler.plan().chunks) == num_chunks


def test_known_pages_of_waiting_prompts_are_no_pieces_to_come():
    """Of three prompts one piece each is left: eight would be padding."""
    _, scheduler, device = scheduled(shapes=SHAPES._replace(num_pieces=(1, 8)))
    scheduler.add(request(range(17)))
    finish(scheduler, device)
    for last in range(3):
        scheduler.add(request([*range(16), 90 + last]))
    assert len(scheduler.plan().chunks) == 1


@pytest.mark.parametrize("is_invariant", [False, True])
def test_a_choice_that_starts_over_sends_nothing_twice(is_invariant):
    """Two rows of 16 tokens in five pages: the second has to make room for the first."""
    shapes = INVARIANT if is_invariant else SHAPES
    _, scheduler, device = scheduled(5, shapes, is_invariant=is_invariant)
    sampling = Sampling(max_new_tokens=11, stop_ids=()).resolved({})
    choices = [Choice(Request(str(i), (i, 1, 2, 3, 4), sampling), 0, 11) for i in range(2)]
    for choice in choices:
        scheduler.add(choice)
    answers = collections.defaultdict(list)
    for output in finish(scheduler, device):
        answers[output.id] += output.tokens
    assert scheduler.num_preempted >= 1
    assert [answers[str(i)] for i in range(2)] == [expected(c.request) for c in choices]
