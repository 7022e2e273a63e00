"""From the body of an OpenAI request to requests of the engine."""

import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.request import Request
from hunyuan_jax.infer.settings import Sampling
from hunyuan_jax.serve import fields
from hunyuan_jax.serve.errors import Refused
from hunyuan_jax.serve.reasoning import tags_of
from hunyuan_jax.tokenizer import Tokenizer

# Names that a chat template gets from us.
_OWN_NAMES = {"messages", "tokenizer", "parse_special", "add_generation_prompt"}


@dataclasses.dataclass(frozen=True)
class Served:
    """The model as its clients see it.

    name: what `model` must be; vocab_size: of the model's table; max_context: tokens of a prompt
    and its answer; recommended: sampling settings that hold where a request names none; stop_ids:
    of tokenizer and model; max_choices: of one request.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_context: int
    recommended: Mapping[str, float | int]
    stop_ids: tuple[int, ...]
    max_choices: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def thinks(self) -> bool:
        """Whether the model may think before it answers."""
        return "think" in (self.tokenizer.chat_template or "")


@dataclasses.dataclass(frozen=True)
class Job:
    """A request of a client: one request of the engine for each prompt.

    options: the fields of its table; max_logprobs: most likely tokens that answers list, or None;
    texts: prompts as text, for `echo`; starts_thinking: the prompt ends inside of reasoning.
    """

    id: str
    is_chat: bool
    created: int
    options: SimpleNamespace
    requests: tuple[Request, ...]
    max_logprobs: int | None
    texts: tuple[str, ...] = ()
    starts_thinking: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(request.tokens) for request in self.requests)


def completion_job(served: Served, body: Mapping[str, Any]) -> Job:
    """The job of a body of /v1/completions.

    Raises:
      Refused: what the client must change.
    """
    options = _options(served, fields.COMPLETION, body)
    if options.prompt is None:
        raise Refused("prompt is missing; it is what the model continues.", param="prompt")
    if options.best_of not in (None, options.n):
        raise Refused(
            f"best_of = {options.best_of} must be absent or equal to n = {options.n}.",
            param="best_of",
        )
    only_score = options.max_tokens == 0
    if only_score and not options.echo:
        raise Refused("max_tokens = 0 answers nothing without echo; set echo.", param="max_tokens")
    prompts = [
        served.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt
        for prompt in options.prompt
    ]
    if options.echo and options.logprobs is not None:
        options.prompt_logprobs = max(options.prompt_logprobs or 0, options.logprobs)
    rows = [_row(served, options, prompt, "prompt", only_score) for prompt in prompts]
    if len(rows) * options.n > served.max_choices:
        raise Refused(
            f"{len(rows)} prompts with n = {options.n} are {len(rows) * options.n} choices; this "
            f"server takes at most {served.max_choices} in one request.",
            param="prompt",
        )
    texts = tuple(
        served.tokenizer.decode(row, skip_special=options.skip_special_tokens) if options.echo
        else ""
        for row in rows
    )  # fmt: skip
    return _job("cmpl", False, served, options, rows, options.logprobs, texts, only_score)


def chat_job(served: Served, body: Mapping[str, Any]) -> Job:
    """The job of a body of /v1/chat/completions; errors as `completion_job`."""
    options = _options(served, fields.CHAT, body)
    row = _row(served, options, chat_ids(served, options), "messages", False)
    options.max_tokens = options.max_completion_tokens or options.max_tokens
    if options.top_logprobs and not options.logprobs:
        raise Refused("top_logprobs needs logprobs: true.", param="top_logprobs")
    if options.n > served.max_choices:
        raise Refused(
            f"n = {options.n} must be at most {served.max_choices}, the choices that wait here.",
            param="n",
        )
    max_logprobs = options.top_logprobs if options.logprobs else None
    return dataclasses.replace(
        _job("chatcmpl", True, served, options, [row], max_logprobs),
        starts_thinking=served.thinks and _ends_thinking(served, options, row),
    )


def _ends_thinking(served: Served, options: SimpleNamespace, row: Sequence[int]) -> bool:
    """Whether a prompt ends inside of reasoning: the template's last words, or what is continued,
    have opened it.
    """
    tags = tags_of(served.tokenizer.chat_template)
    begun = ""
    if options.continue_final_message:
        begun = _message(len(options.messages) - 1, options.messages[-1])["content"]
    end = len(row) - len(served.tokenizer.encode(begun))
    written = served.tokenizer.decode(row[max(0, end - 8) : end]).rstrip()
    opened = tags.think * written.endswith(tags.think) + begun
    return opened.rfind(tags.think) > opened.rfind(tags.think_end)


def chat_ids(served: Served, options: SimpleNamespace) -> list[int]:
    """The ids of the chat that `messages` are, ready to be answered.

    Raises:
      Refused: malformed messages, or what the model's template cannot write.
    """
    if options.messages is None:
        raise Refused("messages is missing; it is the chat to answer.", param="messages")
    messages = [_message(index, message) for index, message in enumerate(options.messages)]
    ends_with_assistant = messages[-1]["role"] == "assistant"
    variables = {
        name: value for name, value in options.chat_template_kwargs.items() if value is not None
    }
    if taken := _OWN_NAMES & variables.keys():
        raise Refused(
            f"chat_template_kwargs holds {min(taken)}, which the server sets; leave it out.",
            param="chat_template_kwargs",
        )
    if options.add_generation_prompt is not None and served.tokenizer.chat_template:
        variables["add_generation_prompt"] = options.add_generation_prompt
    tail: list[int] = []
    if options.continue_final_message:
        if not ends_with_assistant or len(messages) < 2:
            raise Refused(
                "continue_final_message continues an assistant's message, the last of several; "
                "add it.",
                param="continue_final_message",
            )
        begun = messages.pop()
        if begun.get("reasoning_content"):
            raise Refused(
                "continue_final_message continues the content of a message, which comes after its "
                "reasoning_content; write the reasoning into the content, in the template's tags.",
                param="messages",
            )
        tail = served.tokenizer.encode(begun["content"])
    elif ends_with_assistant and not variables.get("add_generation_prompt"):
        raise Refused(
            "messages end with an assistant's message, which leaves nothing to answer; add a "
            "user's message, or set continue_final_message.",
            param="messages",
        )
    if options.reasoning_effort is not None:
        variables["reasoning_effort"] = _effort(served, options.reasoning_effort)
    if variables.get("enable_thinking") is False and not served.tokenizer.chat_template:
        del variables["enable_thinking"]  # a model that never thinks
    try:
        ids = render_chat(messages, served.tokenizer, **variables)
    except ValueError as e:
        raise Refused(f"{e}.", param="messages") from None
    if not ids:
        raise Refused(
            "the model's chat template writes nothing for these messages; check their roles.",
            param="messages",
        )
    return ids + tail


def _effort(served: Served, effort: str) -> str:
    """What the template calls an effort of reasoning."""
    template = served.tokenizer.chat_template or ""
    if "reasoning_effort" not in template:
        raise Refused(
            "reasoning_effort is not known to this model's chat template; leave it out.",
            param="reasoning_effort",
        )
    return "no_think" if effort == "none" and "no_think" in template else effort


def tokenize(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a body of /tokenize; errors as `completion_job`."""
    options = _options(served, fields.TOKENIZE, body)
    if (options.prompt is None) == (options.messages is None):
        raise Refused("give either prompt or messages.", param="prompt")
    if options.prompt is None:
        ids = chat_ids(served, options)
    else:
        ids = served.tokenizer.encode(options.prompt, parse_special=True)
    strings = None
    if options.return_token_strs:
        strings = [served.tokenizer.decode([token_id]) for token_id in ids]
    return {
        "count": len(ids),
        "max_model_len": served.max_context,
        "tokens": ids,
        "token_strs": strings,
    }


def detokenize(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a body of /detokenize; errors as `completion_job`."""
    options = _options(served, fields.DETOKENIZE, body)
    if options.tokens is None:
        raise Refused("tokens is missing.", param="tokens")
    _check_ids(served, options.tokens, "tokens")
    return {"prompt": served.tokenizer.decode(options.tokens)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """The answer of /tokenizer_info: what lm-eval's remote tokenizer reads."""
    tokenizer = served.tokenizer
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id,
             "pad_token": tokenizer.pad_id}  # fmt: skip
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: tokenizer.decode([token_id]) for name, token_id in names.items()},
        "chat_template": tokenizer.chat_template,
        "model_max_length": served.max_context,
    }


def models(served: Served) -> dict[str, Any]:
    """The answer of /v1/models."""
    return {"object": "list", "data": [model(served)]}


def model(served: Served) -> dict[str, Any]:
    """The answer of /v1/models/NAME."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "hunyuan_jax",
        "root": served.name,
        "parent": None,
        "max_model_len": served.max_context,
    }


def check_model(served: Served, name: str | None) -> None:
    """Raises Refused (404) where another model than ours is named."""
    if name not in (None, "", served.name):
        raise Refused(
            f"the model {name!r} does not exist here; this server has {served.name!r}.",
            status=404,
            param="model",
            code="model_not_found",
        )


def _options(
    served: Served, table: Mapping[str, fields.Field], body: Mapping[str, Any]
) -> SimpleNamespace:
    options = fields.read_fields(table, body)
    check_model(served, options.model)
    return options


def _message(index: int, message: Mapping[str, Any]) -> dict[str, str]:
    """The role and the text of a message."""
    role, content = message.get("role"), message.get("content")
    where = f"messages[{index}]"
    if not isinstance(role, str) or not 0 < len(role) <= 64:
        raise Refused(
            f"{where} needs a role, such as system, user or assistant.", param="messages"
        )
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise Refused(f"{where} has {name}; this server takes texts only.", param="messages")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise Refused(
            f'{where} needs a content: a text, or a list of {{"type": "text", "text": TEXT}}.',
            param="messages",
        )
    said = {"role": "system" if role == "developer" else role, "content": content}
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        return said
    if not isinstance(reasoning, str):
        raise Refused(f"{where} needs a text as reasoning_content, or none.", param="messages")
    return said | {"reasoning_content": reasoning}


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    shown = kind if isinstance(kind, str) and len(kind) < 32 else "unknown"
    raise Refused(
        f"{where} has a part of the kind {shown!r}; this server takes text parts only, and opens "
        "no addresses.",
        param="messages",
    )


def _row(
    served: Served, options: SimpleNamespace, ids: Sequence[int], param: str, only_score: bool
) -> tuple[int, ...]:
    """The prompt, checked and maybe truncated."""
    room = served.max_context - (not only_score)
    if options.truncate_prompt_tokens is not None:
        kept = options.truncate_prompt_tokens
        ids = ids[-(room if kept < 1 else kept) :]
    if not ids:
        raise Refused(f"{param} is empty; it must have at least one token.", param=param)
    _check_ids(served, ids, param)
    if len(ids) > room:
        raise Refused(
            f"{param} has {len(ids)} tokens; at most {room} fit into the context of "
            f"{served.max_context} tokens. Shorten it, or set truncate_prompt_tokens.",
            param=param,
            code="context_length_exceeded",
        )
    return tuple(ids)


def _check_ids(served: Served, ids: Sequence[int], param: str) -> None:
    if ids and max(ids) >= served.vocab_size:
        raise Refused(
            f"{param} holds the id {max(ids)}; ids are 0 to {served.vocab_size - 1}.", param=param
        )


def _job(
    prefix: str,
    is_chat: bool,
    served: Served,
    options: SimpleNamespace,
    rows: Sequence[tuple[int, ...]],
    max_logprobs: int | None,
    texts: tuple[str, ...] = (),
    only_score: bool = False,
) -> Job:
    _check_ids(served, tuple(options.logit_bias), "logit_bias")
    _check_ids(served, options.stop_token_ids, "stop_token_ids")
    job_id = f"{prefix}-{secrets.token_hex(16)}"
    requests = []
    for index, row in enumerate(rows):
        sampling = _sampling(served, options, len(row), max_logprobs, only_score)
        requests.append(
            Request(
                f"{job_id}-{index}",
                row,
                sampling,
                n=options.n,
                cache_salt=options.cache_salt,
                only_score=only_score,
            )
        )
    return Job(job_id, is_chat, int(time.time()), options, tuple(requests), max_logprobs, texts)


def _sampling(
    served: Served,
    options: SimpleNamespace,
    num_prompt: int,
    max_logprobs: int | None,
    only_score: bool,
) -> Sampling:
    """What the request says, else the model's folder, else the default."""
    room = max(served.max_context - num_prompt, 1)
    top_p, seed = options.top_p, options.seed
    eos = () if options.ignore_eos else served.stop_ids
    try:
        sampling = Sampling(
            max_new_tokens=options.max_tokens or None,
            min_new_tokens=options.min_tokens,
            temperature=options.temperature,
            top_k=None if options.top_k is None else max(options.top_k, 0),
            top_p=None if top_p is None else max(top_p, 1e-9),
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=tuple(options.logit_bias.items()),
            seed=secrets.randbits(63) if seed is None else seed,
            stop_ids=tuple(dict.fromkeys((*eos, *options.stop_token_ids))),
            logprobs=max_logprobs,
            prompt_logprobs=options.prompt_logprobs,
        ).resolved({"max_new_tokens": room, **served.recommended})
    except ConfigError as e:
        raise Refused(str(e)) from None
    limit = min(sampling.max_new_tokens, room)
    least = 0 if only_score else min(sampling.min_new_tokens, limit)
    return dataclasses.replace(sampling, max_new_tokens=limit, min_new_tokens=least)
