"""Many clients of every kind, for long: no page is lost, memory stays flat, answers stay right."""

import asyncio
import collections
import io
import json
import random
import time

import aiohttp
import pytest

GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
# Prompts whose answers are known before the crowd comes.
PROMPTS = [[5 + i] * (1 + 11 * i) for i in range(16)]
NUM_NEW = (1, 4, 12, 24)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Crowd:
    """Sends requests of random kinds; counts them, and refusals for a full queue."""

    def __init__(self, running, expected, seed):
        self.running, self.expected, self.rng = running, expected, random.Random(seed)
        self.counts = collections.Counter()
        self.url = f"{running.url}/v1/completions"

    async def good(self, session):
        place, num = self.rng.randrange(len(PROMPTS)), self.rng.choice(NUM_NEW)
        body = {**GREEDY, "prompt": PROMPTS[place], "max_tokens": num}
        while True:
            async with session.post(self.url, json=body) as answer:
                value = await answer.json()
                if answer.status == 200:
                    assert value["choices"][0]["text"] == self.expected[place, num]
                    return
                assert answer.status == 429, value
            self.counts["429"] += 1
            await asyncio.sleep(0.1)

    async def leaves(self, session):
        body = {**GREEDY, "prompt": [9] * self.rng.randrange(1, 200), "max_tokens": 10_000}
        body |= {"n": self.rng.randrange(1, 4), "stream": self.rng.random() < 0.5}
        try:
            async with asyncio.timeout(self.rng.random() * 0.2):
                async with session.post(self.url, json=body) as answer:
                    await answer.read()
        except TimeoutError:
            pass

    async def malformed(self, session):
        data = self.rng.choice([b"{", b"[1]", b"\xff", b'{"prompt": 3}', b'{"n": "x"}', b""])
        headers = {"Content-Type": "application/json"}
        async with session.post(self.url, data=data, headers=headers) as answer:
            assert answer.status == 400

    async def oversized(self, session):
        headers = {"Content-Type": "application/json"}
        data = io.BytesIO(b" " * (2**23 + 1))
        try:
            async with session.post(self.url, data=data, headers=headers) as answer:
                assert answer.status == 413
        except aiohttp.ClientError:
            pass  # it hung up before the whole body was sent

    async def slow_reader(self, session):
        body = {**GREEDY, "prompt": [7, 8], "max_tokens": 20, "stream": True}
        async with session.post(self.url, json=body) as answer:
            if answer.status == 200:
                data = b""
                while piece := await answer.content.read(200):
                    data += piece
                    await asyncio.sleep(0.01)
                assert data.endswith(b"data: [DONE]\n\n")

    async def half_open(self, session):
        _, writer = await asyncio.open_connection("127.0.0.1", self.running.port)
        data = json.dumps({"prompt": "a" * 50}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
        writer.write((head + b"Content-Type: application/json\r\n\r\n" + data)[: 40 + len(data)])
        await writer.drain()
        await asyncio.sleep(self.rng.random() * 0.3)
        writer.transport.abort()

    async def run(self, num, num_at_once=24):
        kinds = [self.good] * 12 + [self.leaves] * 4 + [self.malformed] * 2
        kinds += [self.slow_reader, self.half_open]
        numbers = iter(range(num))

        async def client(session):
            for number in numbers:
                kind = self.oversized if number % 50 == 49 else self.rng.choice(kinds)
                await kind(session)
                self.counts[kind.__name__] += 1

        limit = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=limit) as session:
            await asyncio.gather(*(client(session) for _ in range(num_at_once)))


def soak(running, num):
    expected = {}
    for place, prompt in enumerate(PROMPTS):
        for num_new in NUM_NEW:
            body = {**GREEDY, "prompt": prompt, "max_tokens": num_new}
            answer = json.loads(running.post("/v1/completions", body)[2])
            expected[place, num_new] = answer["choices"][0]["text"]
    total = running.engine.stats().pages_total
    sizes, begin, counts = [], time.monotonic(), collections.Counter()
    for seed in range(5):
        crowd = Crowd(running, expected, seed)
        asyncio.run(crowd.run(num // 5))
        counts += crowd.counts
        assert running.is_idle()
        stats = running.engine.stats()
        assert stats.running == stats.waiting == stats.pages_used == 0
        assert stats.pages_total == total >= stats.pages_cached
        sizes.append(resident_bytes())
    assert b'status="500"' not in running.get("/metrics")[2]
    assert running.get("/ready")[0] == 200
    print(f"{num} requests in {time.monotonic() - begin:.0f} s; {dict(counts)}; resident MB ",
          [size >> 20 for size in sizes])  # fmt: skip
    # The first fifth fills caches of the process.
    assert sizes[-1] - sizes[0] < max(2**25, sizes[0] // 20)


@pytest.mark.heavy
def test_a_few_hundred_requests_of_every_kind(shared):
    soak(shared, 300)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_requests_of_every_kind(shared):
    soak(shared, 10_000)
