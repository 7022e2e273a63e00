"""From outputs of the engine to OpenAI's answers, whole or as chunks of a stream."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hunyuan_jax.infer.detokenize import Detokenizer
from hunyuan_jax.infer.request import Output, TokenLogprobs
from hunyuan_jax.serve.openai import Job, Served
from hunyuan_jax.serve.reasoning import ReasoningSplitter, Said, tags_of
from hunyuan_jax.tokenizer import StreamDecoder, Tokenizer

# JSON has no infinity.
_LEAST_LOGPROB = -9999.0


class Delta(NamedTuple):
    """What is new of one choice.

    logprobs: as OpenAI writes them, None unless asked; prompt_logprobs: in the first delta, if
    asked; finish_reason: "stop" or "length" in the last one; stop_reason: the stop string or the
    client's own stop id that ended it.
    """

    index: int
    text: str
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Answer:
    """What the choices of a job have said so far.

    num_tokens: new tokens of all choices; num_cached_tokens: of the prompts, found in the cache;
    is_done: every choice has ended.
    """

    def __init__(self, served: Served, job: Job):
        self.job = job
        self.num_tokens = self.num_cached_tokens = 0
        self._served = served
        self._number = {request.id: number for number, request in enumerate(job.requests)}
        self._choices = [
            _Choice(served, job, number * job.options.n + choice, number)
            for number in range(len(job.requests))
            for choice in range(job.options.n)
        ]

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.is_done for choice in self._choices)

    @property
    def finish_reasons(self) -> list[str]:
        """Of the choices that have ended."""
        return [choice.finish_reason for choice in self._choices if choice.finish_reason]

    def push(self, output: Output) -> tuple[Delta | None, bool]:
        """Returns (what is new, whether a stop string has ended the choice just now).

        What the engine sends after a stop string is not looked at.
        """
        choice = self._choices[self._number[output.id] * self.job.options.n + output.choice]
        if choice.is_done:
            return None, False
        self.num_tokens += len(output.tokens)
        if not choice.has_begun and output.choice == 0:
            self.num_cached_tokens += output.num_cached_tokens
        delta = choice.push(output)
        return delta, choice.is_done and output.finish_reason is None

    def usage(self) -> dict[str, Any]:
        """Token counts as OpenAI writes them."""
        num_prompt = self.job.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": num_prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The answer that these deltas make, in one object."""
        by_index: dict[int, list[Delta]] = {choice.index: [] for choice in self._choices}
        for delta in deltas:
            by_index[delta.index].append(delta)
        make = self._chat_choice if self.job.is_chat else self._text_choice
        choices = [make(index, parts) for index, parts in by_index.items()]
        kind = "chat.completion" if self.job.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Chunks that open a stream: in a chat, the role of each choice."""
        if self.job.is_chat:
            for choice in self._choices:
                yield self._chunk(
                    {
                        "index": choice.index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                )

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """The chunk of a stream that says what is new."""
        ended = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if self.job.is_chat:
            said: dict[str, Any] = {}
            if delta.reasoning:
                said["reasoning_content"] = delta.reasoning
            if delta.text:
                said["content"] = delta.text
            choice = {"index": delta.index, "delta": said, "logprobs": delta.logprobs, **ended}
        else:
            choice = {
                "index": delta.index,
                "text": delta.text,
                "logprobs": delta.logprobs,
                **ended,
            }
        if delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = delta.prompt_logprobs
        if self.job.options.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        chunk = self._chunk(choice)
        if self.job.options.stream_options.continuous_usage_stats:
            chunk["usage"] = self.usage()
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`; it has no choices."""
        return {**self._chunk(), "usage": self.usage()}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.job.is_chat else "text_completion"
        usage = {"usage": None} if self.job.options.stream_options.include_usage else {}
        return {**self._head(kind), "choices": list(choices), **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": kind,
            "created": self.job.created,
            "model": self._served.name,
        }

    def _text_choice(self, index: int, parts: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        return {"index": index, "text": text, **self._ended(index, parts)}

    def _chat_choice(self, index: int, parts: Sequence[Delta]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(part.text for part in parts)}
        if self._served.thinks:
            reasoning = "".join(part.reasoning for part in parts)
            message["reasoning_content"] = reasoning or None
        return {"index": index, "message": message, **self._ended(index, parts)}

    def _ended(self, index: int, parts: Sequence[Delta]) -> dict[str, Any]:
        """What a choice of a chat and one of a text have in common."""
        reason = next((part for part in reversed(parts) if part.finish_reason), None)
        found = {
            "logprobs": _joined([part.logprobs for part in parts if part.logprobs]),
            "finish_reason": reason and reason.finish_reason,
            "stop_reason": reason and reason.stop_reason,
        }
        if parts and parts[0].prompt_logprobs is not None:
            found["prompt_logprobs"] = parts[0].prompt_logprobs
        if self.job.options.return_token_ids:
            number = index // self.job.options.n
            found["token_ids"] = [token for part in parts for token in part.token_ids]
            found["prompt_token_ids"] = list(self.job.requests[number].tokens)
        return found


class _Choice:
    """One choice: its text so far, and how it ended."""

    def __init__(self, served: Served, job: Job, index: int, number: int):
        options = job.options
        self.index = index
        self.finish_reason: str | None = None
        self.has_begun = False
        self._job, self._request = job, job.requests[number]
        self._prompt_text = job.texts[number] if job.texts else ""
        # Tags that are tokens must be seen to be split at.
        tags = tags_of(served.tokenizer.chat_template or "")
        special = served.tokenizer.special_names if job.is_chat and served.thinks else ()
        self._text = Detokenizer(
            served.tokenizer,
            options.stop,
            skip_special=options.skip_special_tokens,
            include_stop=options.include_stop_str_in_output,
            min_tokens=self._request.sampling.min_new_tokens,
            shown=[served.tokenizer.special_id(tag) for tag in tags if tag in special],
        )
        self._splitter = None
        if job.is_chat and served.thinks:
            self._splitter = ReasoningSplitter(job.starts_thinking, tags)
        writer = _chat_logprobs if job.is_chat else _TextLogprobs(served, options).write
        self._write: Callable[..., dict[str, Any]] = writer
        self._names = _Names(served.tokenizer, options.return_tokens_as_token_ids)
        self._tokenizer = served.tokenizer

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    def push(self, output: Output) -> Delta | None:
        """What an output adds, or None if there is nothing to tell yet."""
        options = self._job.options
        stopped_by_id = output.finish_reason == "stop" and bool(output.tokens)
        shown = output.tokens
        if stopped_by_id and not options.include_stop_str_in_output:
            shown = shown[:-1]
        text = self._text.push(shown)
        stop_reason = None
        if output.finish_reason is not None:
            text += self._text.finish()
            self.finish_reason = output.finish_reason
            if stopped_by_id and output.tokens[-1] in options.stop_token_ids:
                stop_reason = output.tokens[-1]
        if self._text.stopped_by is not None:
            self.finish_reason, stop_reason = "stop", self._text.stopped_by
        said = self._split(text)
        entries = []
        is_first, self.has_begun = not self.has_begun, True
        prompt_logprobs = None
        if is_first and output.prompt_logprobs is not None:
            prompt = list(zip(self._request.tokens, output.prompt_logprobs, strict=True))
            if options.prompt_logprobs is not None and not self._echoes_logprobs:
                prompt_logprobs = [_prompt_entry(self._tokenizer, *pair) for pair in prompt]
            if self._echoes_logprobs:
                entries += prompt
        if is_first and self._prompt_text:
            said = said._replace(content=self._prompt_text + said.content)
        if output.logprobs is not None:
            entries += zip(output.tokens, output.logprobs, strict=True)
        logprobs = None
        if self._job.max_logprobs is not None and entries:
            logprobs = self._write(self._names, entries, self._job.max_logprobs)
        if self._job.is_chat and not options.include_reasoning:
            said = said._replace(reasoning="")
        delta = Delta(
            self.index, said.content, said.reasoning, output.tokens, logprobs, prompt_logprobs,
            self.finish_reason, stop_reason,
        )  # fmt: skip
        is_empty = not (delta.text or delta.reasoning or logprobs or delta.finish_reason)
        if is_empty and prompt_logprobs is None and not options.return_token_ids:
            return None
        return delta

    @property
    def _echoes_logprobs(self) -> bool:
        return (
            not self._job.is_chat and self._job.options.echo and self._job.max_logprobs is not None
        )

    def _split(self, text: str) -> Said:
        if self._splitter is None:
            return Said("", text)
        said = self._splitter.push(text)
        if self.is_done:
            rest = self._splitter.finish()
            said = Said(said.reasoning + rest.reasoning, said.content + rest.content)
        return said


_Entry = tuple[int, TokenLogprobs | None]


class _Names:
    """How tokens are named beside their log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token_id: int) -> str:
        """The token's text; its bytes where they are part of a character."""
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self.data(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token_id: int) -> bytes:
        """The token's bytes."""
        return self._tokenizer.decode_bytes([token_id])


class _TextLogprobs:
    """Log-probabilities as /v1/completions writes them; knows how much text there was before."""

    def __init__(self, served: Served, options: Any):
        self._decoder = StreamDecoder(served.tokenizer, skip_special=options.skip_special_tokens)
        self._offset = 0

    def write(self, names: _Names, entries: Sequence[_Entry], num_top: int) -> dict[str, Any]:
        """The object of these tokens."""
        written: dict[str, list] = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []
        }  # fmt: skip
        for token_id, found in entries:
            written["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token_id))
            written["tokens"].append(names.text(token_id))
            written["token_logprobs"].append(found and _finite(found.logprob))
            written["top_logprobs"].append(found and _by_name(names, token_id, found, num_top))
        return written


def _by_name(names: _Names, token_id: int, found: TokenLogprobs, num_top: int) -> dict[str, float]:
    """Log-probabilities by token, best first, the token itself included.

    Of two tokens with the same text the less likely one is named by its id.
    """
    ranked = list(found.top[:num_top])
    if token_id not in (other for other, _ in ranked):
        ranked.append((token_id, found.logprob))
    named: dict[str, float] = {}
    for other, logprob in ranked:
        text = names.text(other)
        named[f"token_id:{other}" if text in named else text] = _finite(logprob)
    return named


def _chat_logprobs(names: _Names, entries: Sequence[_Entry], num_top: int) -> dict[str, Any]:
    """Log-probabilities as /v1/chat/completions writes them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = list(names.data(token_id))
        return {"token": names.text(token_id), "logprob": _finite(logprob), "bytes": data}

    return {
        "content": [
            {
                **entry(token_id, found.logprob),
                "top_logprobs": [entry(*pair) for pair in found.top[:num_top]],
            }
            for token_id, found in entries
        ]
    }


def _prompt_entry(
    tokenizer: Tokenizer, token_id: int, found: TokenLogprobs | None
) -> dict[str, Any] | None:
    """Log-probabilities of a prompt's token, by id, as vLLM writes them."""
    if found is None:
        return None
    ranks = {other: rank for rank, (other, _) in enumerate(found.top, 1)}
    return {
        str(other): {
            "logprob": _finite(logprob),
            "rank": ranks.get(other),
            "decoded_token": tokenizer.decode([other]),
        }
        for other, logprob in dict(((token_id, found.logprob), *found.top)).items()
    }


def _joined(parts: Sequence[dict[str, list]]) -> dict[str, list] | None:
    if not parts:
        return None
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LEAST_LOGPROB else _LEAST_LOGPROB
