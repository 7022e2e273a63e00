"""The commands `generate` and `chat`."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from hunyuan_jax import flags, startup
from hunyuan_jax.config import MeshConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath
from hunyuan_jax.infer.settings import DEFAULTS, Sampling


def _sampling_option(name: str, kind: type, meaning: str) -> flags.Option:
    where = f"generation_config.json's, else {DEFAULTS[name]}"
    return flags.Option(name, kind, meaning, default_meaning=where)


MESH = flags.Option(
    "mesh",
    str,
    "Mesh axes to spread the model over, such as expert:2,tensor:4.",
    default_meaning="one device",
)
QUANTIZE = flags.Option(
    "quantize",
    str,
    "Hold projections and experts in few bits, +head: embedding and head too, w8a8: activations "
    "too; none: in numbers.",
    default_meaning="as the checkpoint's",
    choices=(
        "int8",
        "int4",
        "fp8",
        "easyquant",
        "int8+head",
        "fp8+head",
        "w8a8",
        "w8a8-fp8",
        "none",
    ),
)
MODEL = (
    flags.Option(
        "checkpoint",
        AnyPath,
        "Workdir of a run, model folder, GGUF file or hub id.",
        is_required=True,
    ),
    flags.Option(
        "tokenizer",
        AnyPath,
        "byte, a folder, a file or a hub id.",
        default_meaning="the checkpoint's",
    ),
    MESH,
    QUANTIZE,
    flags.Option(
        "cache_dtype",
        str,
        "Hold keys and values in eight bits.",
        default_meaning="the model's",
        choices=("int8", "fp8"),
    ),
    flags.Option(
        "speculate",
        AnyPath,
        "Who drafts tokens that the model verifies: mtp, ngram or a small model's folder.",
        default_meaning="nobody",
    ),
    flags.Option(
        "speculate_tokens",
        int,
        "Tokens of a draft.",
        default_meaning="1 for mtp, else 4",
        minimum=1,
        maximum=8,
    ),
)
MAX_CONTEXT = flags.Option(
    "max_context",
    int,
    "Tokens of a prompt and its answer.",
    default_meaning="the model's positions",
    minimum=2,
)
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
_SAMPLING = (
    _sampling_option("max_new_tokens", int, "Stop after this many tokens."),
    _sampling_option("min_new_tokens", int, "Draw no stop id before this many tokens."),
    _sampling_option("temperature", float, "Sampling temperature; 0 is greedy."),
    _sampling_option("top_k", int, "Draw from the k most likely tokens; 0 is off."),
    _sampling_option("top_p", float, "Draw from the most likely tokens of this mass; 1 is off."),
    _sampling_option(
        "min_p", float, "Exclude tokens below this share of the likeliest; 0 is off."
    ),
    _sampling_option("repetition_penalty", float, "Penalty of tokens seen before; 1 is off."),
    flags.Option("seed", int, "Random seed for sampling.", Sampling.seed),
)


@flags.command(
    *MODEL,
    *_SAMPLING,
    flags.Option("prompt", str, "Text to continue; not empty.", is_required=True),
)
def generate(values) -> int:
    """Continues --prompt, printing as it goes."""
    start, num_tokens = time.perf_counter(), 0
    with _values_are_settings(), contextlib.ExitStack() as stack:
        sampling = _sampling(values)
        is_first = join()
        lm = load_lm(values)
        engine = lm.model.engine
        if not is_first:
            return follow(engine)
        stack.enter_context(leading(engine))
        pieces = lm.stream(values.prompt, sampling)
        print(values.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            num_tokens += 1
    print()
    seconds, drafts = time.perf_counter() - start, ""
    if values.speculate:
        stats = engine.stats()
        drafts = f"; {stats.accepted_tokens} of {stats.draft_tokens} drafted tokens accepted"
    print(
        f"({num_tokens} tokens in {seconds:.1f} s with loading and compiling{drafts})",
        file=sys.stderr,
    )
    return 0


@flags.command(*MODEL, *_SAMPLING, flags.Option("system", str, "System message.", ""))
def chat(values) -> int:
    """Chats with a model, on the terminal or with questions from a pipe, one a line.

    /reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D leaves.
    """
    with _values_are_settings():
        sampling = _sampling(values)
        lm = load_lm(values)
        from hunyuan_jax.infer import text  # after load_lm, which prepares the import

        conversation = text.Chat(lm, values.system, sampling)
        for question in _questions():
            if question == "/reset":
                conversation.reset()
            elif question:
                _print_answer(conversation.ask(question))
    return 0


def _questions() -> Iterator[str]:
    """Lines of a terminal, or of a pipe, until they end."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  (gives input() a history and editing keys)

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _print_answer(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)


@contextlib.contextmanager
def _values_are_settings() -> Iterator[None]:
    """Turns a ValueError of the library, here about what an option said, into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _sampling(values) -> Sampling:
    """The settings of the options; those that are not given are left to the model's folder."""
    sampling = Sampling(**{option.name: getattr(values, option.name) for option in _SAMPLING})
    idle = [n for n in ("top_k", "top_p", "min_p") if getattr(sampling, n) not in (None, _OFF[n])]
    if sampling.temperature == 0 and idle:
        _note(f"--temperature=0 is greedy, whatever --{' and --'.join(idle)} is")
    return sampling


def join() -> bool:
    """Prepares jax, and joins the processes that were started with the same command, each of which
    then has a part of the model; whether this one is the first, which serves.
    """
    startup.prepare()
    import jax

    from hunyuan_jax.parallel import hosts, mesh

    mesh.join_processes()
    if jax.distributed.is_initialized():
        # jax keeps it for a run that saves.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_count() > 1 and mesh.device_kind(mesh.single_device_mesh()) == "cpu":
        # With programs from the cache Gloo ended one of two processes: their collectives had other
        # sizes, so probably another order (jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    return hosts.is_first()


def follow(engine: Any) -> int:
    """Computes what process 0 does until that one ends; returns its exit status."""
    import jax

    name = f"process {jax.process_index()} of {jax.process_count()}"
    _note(f"{name} follows process 0")

    def on_signal(*_: Any) -> None:
        _note(f"{name} ends with process 0; send signals there")

    # Supervisors send them to all, and process 0 has answers to finish.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return engine.follow()


@contextlib.contextmanager
def leading(engine: Any) -> Iterator[None]:
    """Lets the processes that follow end as the block does."""
    try:
        yield
    except Exception as e:
        engine.close(2 if isinstance(e, ValueError) else 1)
        raise
    engine.close()


def load_lm(values) -> Any:
    """The LM that the options of MODEL name."""
    folder = startup.prepare()
    kept = f"; compiled programs are kept in {folder}" if folder else ""
    from hunyuan_jax.infer import text
    from hunyuan_jax.parallel import hosts

    say = _note if hosts.is_first() else lambda _: None
    say(f"loading {values.checkpoint}{kept}")
    start = time.perf_counter()
    lm = text.load(
        values.checkpoint,
        tokenizer=values.tokenizer,
        mesh=_mesh(values.mesh),
        quantize=values.quantize,
        cache_dtype=values.cache_dtype,
        speculate=values.speculate,
        speculate_tokens=values.speculate_tokens,
    )
    seconds = time.perf_counter() - start
    say(f"loaded in {seconds:.1f} s; programs are compiled next")
    return lm


def load_lm_within(values) -> Any:
    """As `load_lm`, where --max_context must be within the model's positions."""
    lm = load_lm(values)
    positions = lm.model.config.max_position
    if values.max_context is not None and values.max_context > positions:
        raise ConfigError(
            f"--max_context={values.max_context} is more than the {positions} positions of the "
            "model; use at most those."
        )
    return lm


def _note(text: str) -> None:
    """Prints what the command is doing, apart from what the model writes."""
    print(text, file=sys.stderr, flush=True)


def mesh_config(spec: str) -> MeshConfig:
    """The mesh that --mesh names.

    Raises:
      ConfigError: not AXIS:SIZE,...
    """
    names = list(MeshConfig().axis_sizes)
    pairs = [part.split(":") for part in spec.split(",")]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in names or not pair[1].isdecimal():
            raise ConfigError(
                f"--mesh={spec}: {':'.join(pair)!r} is not AXIS:SIZE; axes are {', '.join(names)}."
            )
    sizes = {name: int(size) for name, size in pairs}
    return MeshConfig(**dict.fromkeys(names, 1) | sizes)


def _mesh(spec: str | None) -> Any:
    """The mesh that --mesh names over all devices, or None for one device."""
    import jax

    if spec is None:
        if (num := jax.process_count()) > 1:
            raise ConfigError(
                f"--mesh is not given, and {num} processes have joined; say how the model is "
                "spread over all of their devices, such as --mesh=expert:16."
            )
        return None
    config = mesh_config(spec)
    from hunyuan_jax.parallel.mesh import make_mesh

    return make_mesh(config)
