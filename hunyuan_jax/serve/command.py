"""The command `serve`."""

import contextlib
import importlib.util
import ipaddress
import os
import socket
import sys

from hunyuan_jax import flags
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import LocalPath
from hunyuan_jax.infer.command import (
    MAX_CONTEXT,
    MODEL,
    follow,
    join,
    leading,
    load_lm_within,
)


@flags.command(
    *MODEL,
    flags.Option("model_name", str, "Name of the model.", default_meaning="the folder's name"),
    flags.Option("host", str, "Address to listen to.", "127.0.0.1"),
    flags.Option("port", int, "Port to listen to; 0 takes a free one.", 8000, minimum=0,
                 maximum=65535),
    flags.Option("api_key", str, "Key that clients must send.", default_meaning="none"),
    flags.Option(
        "api_key_file", LocalPath, "File that holds the key, out of sight of `ps`.",
        default_meaning="none",
    ),
    flags.Option("max_rows", int, "Answers that are computed at the same time.", 64, minimum=1),
    MAX_CONTEXT,
    flags.Option("max_queue", int, "Answers that wait for their turn.", 1024, minimum=1),
    flags.Option(
        "invariant", bool, "An answer's bits do not depend on its neighbours; slower.", False
    ),
    flags.Option(
        "drain_seconds", int, "Time for open answers to end after SIGTERM.", 30, minimum=0
    ),
)  # fmt: skip
def serve(values) -> int:
    """Serves a model over HTTP with the API of OpenAI.

    SIGTERM finishes the open answers, then ends the server.  On a slice of several hosts, start
    the same command with --mesh on each: the first process answers, the others compute with it.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("serve needs aiohttp; pip install -e '.[serve]'.")
    is_first = join()
    from hunyuan_jax.parallel import hosts

    with contextlib.ExitStack() as stack:
        with hosts.fail_together():
            if is_first:
                api_key = _api_key(values)
                listener = stack.enter_context(_listener(values.host, values.port))
        served, engine = _load(values)
        if not is_first:
            return follow(engine)
        stack.enter_context(leading(engine))
        return _serve(values, served, engine, listener, api_key)


def _serve(values, served, engine, listener: socket.socket, api_key: str | None) -> int:
    import asyncio

    from hunyuan_jax.serve.http import Server, Settings

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    say(f"sampling where a request names none: {_defaults(served)}")
    settings = Settings(
        api_key=api_key, is_local=_is_local(values.host), drain_seconds=values.drain_seconds
    )
    if not settings.is_local and api_key is None:
        say(
            f"warning: --host={values.host} lets other machines in and --api_key is not set; "
            "anybody who reaches this port can use the model."
        )
    server = Server(served, engine, settings, say)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    say(f"compiling the programs of {served.name} ...")
    status = asyncio.run(
        server.run(
            listener, lambda: say(f"{served.name} is served on {address}; a page to chat is there")
        )
    )
    if server.is_still_busy:
        # At once: native threads that are still at work would abort the process when the
        # interpreter ends.
        engine.close(status, at_once=True)
        os._exit(status)
    return status


def _load(values):
    """The model of --checkpoint as clients see it, and its engine."""
    from hunyuan_jax.infer.request import Limits
    from hunyuan_jax.serve.openai import Served

    lm = load_lm_within(values)
    limits = Limits(
        max_rows=values.max_rows,
        max_context=values.max_context,
        max_queue=values.max_queue,
        invariant=values.invariant,
    )
    engine = lm.model.new_engine(limits)
    served = Served(
        name=values.model_name or os.path.basename(os.path.abspath(values.checkpoint)),
        tokenizer=lm.tokenizer,
        vocab_size=lm.model.config.vocab_size,
        max_context=engine.max_context,
        recommended=lm.recommended,
        stop_ids=lm.stop_ids,
        max_choices=values.max_queue,
    )
    return served, engine


def _defaults(served) -> str:
    from hunyuan_jax.infer.settings import Sampling

    resolved = Sampling().resolved(served.recommended)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    return ", ".join(f"{name} {getattr(resolved, name):g}" for name in names)


def _listener(host: str, port: int) -> socket.socket:
    """A socket bound before the weights are read, so that a taken port is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as failed:
            listener = failed.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            failed.pop_all()
    except OSError as e:
        raise ConfigError(
            f"--host={host} --port={port} cannot be listened to: {e.strerror or e}; choose "
            "another port, or 0 for a free one."
        ) from e
    return listener


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _api_key(values) -> str | None:
    if values.api_key_file is None:
        return values.api_key or None
    if values.api_key:
        raise ConfigError("--api_key and --api_key_file are both given; give one.")
    try:
        with open(values.api_key_file, encoding="utf-8") as file:
            key = file.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--api_key_file={values.api_key_file} cannot be read: {e}.") from e
    if not key:
        raise ConfigError(f"--api_key_file={values.api_key_file} is empty; write the key into it.")
    return key
