"""The chat page in a real browser, driven over its debugging port."""

import asyncio
import base64
import contextlib
import json
import re
import shutil
import subprocess
import time

import aiohttp
import pytest

from hunyuan_jax.serve.http import Settings
from support import serving
from support.processes import PATIENCE

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: the page was not opened in a browser"
)


class Tab:
    """A page of the browser."""

    def __init__(self, socket):
        self._socket, self._number = socket, 0
        self.failures = []

    async def call(self, method, **params):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown" or (
                message.get("method") == "Log.entryAdded"
                and message["params"]["entry"]["level"] == "error"
            ):
                self.failures.append(message["params"])

    async def value(self, expression):
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression):
        end = time.monotonic() + PATIENCE
        while not await self.value(expression):
            assert time.monotonic() < end, expression
            await asyncio.sleep(0.02)

    async def say(self, text):
        await self.value(f"document.getElementById('text').value = {json.dumps(text)}")
        await self.value("document.getElementById('form').requestSubmit()")


@contextlib.asynccontextmanager
async def open_page(url, profile):
    options = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking "
        "--disable-component-update --disable-sync --no-first-run --window-size=900,700 "
        "--remote-debugging-port=0"
    )
    process = subprocess.Popen(
        [CHROMIUM, *options.split(), f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession() as session:
            targets = await first_targets(session, profile / "DevToolsActivePort")
            page = next(target for target in targets if target["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=url)
                await tab.until("document.readyState === 'complete' && !!document.title")
                yield tab
    finally:
        process.terminate()
        process.wait(30)


async def first_targets(session, port_file):
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError, aiohttp.ClientError, IndexError):
            port = port_file.read_text().splitlines()[0]
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                if targets := await answer.json():
                    return targets
        assert time.monotonic() < end, "the browser does not answer"
        await asyncio.sleep(0.1)


ANSWER = "document.querySelectorAll('article.assistant div:last-of-type')"
LAST = f"[...{ANSWER}].at(-1).textContent"


@pytest.mark.heavy
@needs_chromium
def test_one_can_chat_stop_and_start_over(shared, slow, tmp_path):
    async def run():
        async with open_page(slow.url, tmp_path / "profile") as tab:
            await tab.until("document.title === 'tiny'")
            await tab.value("document.getElementById('max_tokens').value = 12")
            await tab.value("document.getElementById('temperature').value = 0")
            await tab.say("<b>Who</b> are you?")
            await tab.until("['length', 'stop'].includes(document.body.dataset.state)")
            question = await tab.value("document.querySelector('article.user').textContent")
            assert question == "<b>Who</b> are you?"
            expected = json.loads(
                shared.post(
                    "/v1/chat/completions",
                    {
                        "messages": [{"role": "user", "content": question}],
                        "max_tokens": 12,
                        "temperature": 0,
                    },
                )[2]
            )["choices"][0]["message"]["content"]
            assert await tab.value(LAST) == expected
            footer = await tab.value(
                "document.querySelector('article.assistant footer').textContent"
            )
            assert re.search(r"12 tokens, \d", footer)
            # An answer without a limit, stopped while it flows.
            await tab.value("document.getElementById('max_tokens').value = ''")
            await tab.value("document.getElementById('temperature').value = 2")
            for _ in range(5):  # a random answer may end by itself before it is stopped
                await tab.say("Go on")
                await tab.until(f"{LAST}.length > 3 || document.body.dataset.state !== 'running'")
                await tab.value("document.getElementById('stop').click()")
                await tab.until("document.body.dataset.state !== 'running'")
                if await tab.value("document.body.dataset.state") == "stopped":
                    break
            assert await tab.value("document.body.dataset.state") == "stopped"
            assert await tab.value("document.getElementById('stop').hidden")
            for scheme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                await tab.call("Emulation.setEmulatedMedia", features=features)
                shot = await tab.call("Page.captureScreenshot", format="png")
                (tmp_path / f"{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
            await tab.value("document.getElementById('reset').click()")
            assert await tab.value("document.querySelectorAll('article').length") == 0
            assert tab.failures == []

    asyncio.run(run())
    assert slow.is_idle()
    light, dark = ((tmp_path / f"{scheme}.png").read_bytes() for scheme in ("light", "dark"))
    assert light.startswith(b"\x89PNG") and light != dark


@pytest.mark.heavy
@needs_chromium
def test_a_wrong_request_is_shown_and_a_key_asked_for(pretrained, engine, tmp_path):
    settings = Settings(api_key="secret")
    with serving.running(engine, serving.served(pretrained), settings) as running:

        async def run():
            async with open_page(running.url, tmp_path / "profile") as tab:
                await tab.until("!document.getElementById('settings').hidden")
                await tab.value("document.getElementById('key').value = 'secret'")
                await tab.value(
                    "document.getElementById('key').dispatchEvent(new Event('change'))"
                )
                await tab.until("document.title === 'tiny'")
                await tab.say("x " * 300)
                await tab.until("document.body.dataset.state === 'failed'")
                error = await tab.value("document.querySelector('article.error').textContent")
                assert "at most 255 fit" in error

        asyncio.run(run())


def test_the_page_asks_nobody_else(shared):
    status, headers, body = shared.get("/")
    page = body.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert not re.search(r"https?://|//\w", page.replace("data:,", ""))
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert page.count("<script") == 1
