"""`load`: a model with its tokenizer, for text in and text out; and a conversation with it."""

import dataclasses
import functools
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from hunyuan_jax.chat.render import render_chat, said
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import pretrained, score
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Request
from hunyuan_jax.infer.settings import Sampling, read_sampling
from hunyuan_jax.parallel import hosts
from hunyuan_jax.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from hunyuan_jax.weights.open import open_model

# A text, or its token ids.
Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote.

    text: without stop ids and special tokens; token_ids: all new tokens, the stop id included;
    finish_reason: "stop" after a stop id, "length" where max_new_tokens or the model's positions
    ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class LM:
    """A model with its tokenizer.

    Where a method takes `prompts`, it takes one prompt or a list of prompts in any lengths, and
    returns one result or a list.  A prompt is a text or a list of token ids.  A text is encoded
    without a bos, and the names of special tokens in it are plain text.

    model: Pretrained; tokenizer: Tokenizer; recommended: sampling settings of the model's folder.
    """

    def __init__(
        self,
        model: Pretrained,
        tokenizer: Tokenizer,
        recommended: Mapping[str, float | int] | None = None,
    ):
        """`recommended`: as `read_sampling` returns them."""
        self.model = model
        self.tokenizer = tokenizer
        self.recommended = dict(recommended or {})

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those of the tokenizer and of the model."""
        return tuple(sorted({*self.tokenizer.stop_ids, *self.model.config.eos_token_ids}))

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None
    ) -> Completion | list[Completion]:
        """Continues each prompt.

        With temperature 0 a prompt's tokens are the same alone and in a list; else they depend on
        the seed and the prompt's place in the list.

        Args:
          prompts: see `LM`.
          sampling: None is Sampling().

        Raises:
          ValueError: a prompt that is empty, leaves no position free or holds an unknown id.
        """
        rows, is_single = self._rows(prompts, num_new=1)
        sampling, stop_ids = self._resolved(sampling)
        sampling = dataclasses.replace(sampling, stop_ids=stop_ids)
        requests = [
            Request(str(place), tuple(row), sampling, first_choice=place)
            for place, row in enumerate(rows)
        ]
        token_ids: list[list[int]] = [[] for _ in rows]
        reasons = [""] * len(rows)
        for output in self.model.engine.run(requests):
            place = int(output.id)
            token_ids[place] += output.tokens
            reasons[place] = output.finish_reason
        completions = [
            self._completion(ids, reason) for ids, reason in zip(token_ids, reasons, strict=True)
        ]
        return completions[0] if is_single else completions

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Yields pieces of the text that continues one prompt, exactly one a token (maybe ""),
        never half a character.  Errors are those of `generate`, raised at the call.
        """
        tokens = self.stream_tokens(prompt, sampling)
        return (piece for piece, _ in tokens)

    def stream_tokens(
        self, prompt: Prompt, sampling: Sampling | None = None
    ) -> Iterator[tuple[str, int]]:
        """As `stream`, each piece with the id of its token."""
        row = self._row("the prompt", prompt, num_new=1)
        sampling, stop_ids = self._resolved(sampling)
        room = self._max_position - len(row)
        limited = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        tokens = self.model.stream_rows([row], limited, stop_ids)
        decoder = StreamDecoder(self.tokenizer, skip_special=True)
        return _texts(tokens, decoder, stop_ids, limited.max_new_tokens)

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Completion:
        """Answers a conversation, a list of {"role", "content"}, by the model's chat template.

        Raises:
          ValueError: as `chat_ids` and `generate`.
        """
        return self.generate(self.chat_ids(messages), sampling)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the conversation by the model's chat template (`render_chat`), ready to be
        answered.  Contents never become control tokens.

        Raises:
          ConfigError: the tokenizer has neither a chat template nor chat tokens.
          ValueError: malformed messages, roles that the template does not know, or an assistant's
            turn at the end.
        """
        if self._chat_fault:
            raise ConfigError(
                f"this tokenizer cannot chat: {self._chat_fault}; use `generate`, or pass "
                "tokenizer=FILE with chat tokens."
            )
        ids = render_chat(messages, self.tokenizer)
        if not ids:
            raise ValueError(
                f"the chat template writes nothing for messages = {reprlib.repr(messages)}; check "
                "their roles."
            )
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "messages end with an assistant's turn, which leaves nothing to answer; add a "
                "user's turn."
            )
        return ids

    def said(self, token_ids: Sequence[int], sampling: Sampling | None = None) -> str:
        """The content of the assistant's turn that the model wrote as these ids, with the names of
        special tokens but for a stop id at its end.

        They are tokens again when the turn is part of a chat, as in transformers; a chat template
        can so find the end of a thought, and leave old thoughts out.
        """
        stop_ids = self._resolved(sampling)[1]
        is_ended = bool(token_ids) and token_ids[-1] in stop_ids
        return said(token_ids[: len(token_ids) - is_ended], self.tokenizer)

    def logprobs(self, prompts: Prompt | Sequence[Prompt]) -> np.ndarray | list[np.ndarray]:
        """log p in nats of each token given those before it, float32 [tokens - 1] for each prompt:
        entry i is that of token i + 1.

        Raises:
          ValueError: a prompt that is empty, too long or holds an unknown id.
        """
        rows, is_single = self._rows(prompts)
        found = score.logprobs(self.model, rows)
        return found[0] if is_single else found

    def router_stats(self, prompts: Prompt | Sequence[Prompt]) -> dict[str, np.ndarray]:
        """How the routers spread the tokens of all prompts together: float32 by layer L and expert
        E.

        demand_LE: share of a layer's choices that name the expert; load_LE: share of the served
        choices that it serves, which is the same without a capacity; entropy_L: mean entropy of
        the router's probabilities in nats.

        Raises:
          ValueError: a dense model, and as `logprobs`.
        """
        if not self.model.config.is_moe:
            raise ValueError(
                "router_stats needs a mixture of experts; this model is dense (num_experts = 1)."
            )
        return self._router_stats(self._rows(prompts)[0])

    @functools.cached_property
    def _router_stats(self) -> score.RouterStats:
        return score.RouterStats(self.model)

    @functools.cached_property
    def _chat_fault(self) -> str | None:
        """Why no chat can be written with this tokenizer, or None."""
        if self.tokenizer.chat_template is not None:
            return None
        try:
            render_chat([{"role": "user", "content": "?"}], self.tokenizer)
        except ValueError as e:
            return str(e)
        return None

    @property
    def _max_position(self) -> int:
        return self.model.config.max_position

    def _resolved(self, sampling: Sampling | None) -> tuple[Sampling, tuple[int, ...]]:
        """(settings without None but for stop_ids, the stop ids)."""
        if not isinstance(sampling, Sampling | None):
            raise TypeError(f"sampling = {sampling!r} must be a hunyuan_jax.Sampling(...).")
        resolved = (sampling or Sampling()).resolved(self.recommended)
        return resolved, self.stop_ids if resolved.stop_ids is None else resolved.stop_ids

    def _rows(
        self, prompts: Prompt | Sequence[Prompt], num_new: int = 0
    ) -> tuple[list[list[int]], bool]:
        """(token ids of each prompt, whether `prompts` is a single one)."""
        if isinstance(prompts, str):
            return [self._row("the prompt", prompts, num_new)], True
        if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts = {reprlib.repr(prompts)} must be a text, a list of token ids, or a "
                "list of these."
            )
        prompts = list(prompts)
        if not prompts:
            raise ValueError("prompts is empty; pass at least one text or list of token ids.")
        if not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0:
            return [self._row("the prompt", prompts, num_new)], True
        rows = [self._row(f"prompt {i}", prompt, num_new) for i, prompt in enumerate(prompts)]
        return rows, False

    def _row(self, name: str, prompt: Prompt, num_new: int) -> list[int]:
        """The ids of a prompt that leaves num_new positions free; `name` is for errors."""
        if isinstance(prompt, str):
            ids = np.array(self.tokenizer.encode(prompt), np.int64)
        else:
            ids = np.asarray(prompt)
        if not ids.size:
            raise ValueError(f"{name} is empty; it must have at least one token.")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{name} = {reprlib.repr(prompt)} must be a text or a list of token ids."
            )
        if ids.min() < 0 or ids.max() >= self.model.config.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"{name} holds the id {wrong}; ids are 0 to {self.model.config.vocab_size - 1}."
            )
        if len(ids) + num_new > self._max_position:
            raise ValueError(
                f"{name} has {len(ids)} tokens; at most {self._max_position - num_new} fit into "
                f"the {self._max_position} positions of the model"
                + (f" with {num_new} new" if num_new else "")
                + ". Shorten it."
            )
        return ids.tolist()

    def _completion(self, token_ids: list[int], reason: str) -> Completion:
        said = token_ids[:-1] if reason == "stop" else token_ids
        text = self.tokenizer.decode(said, skip_special=True)
        return Completion(text, tuple(token_ids), reason)


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike | None = None,
    tokenizer: str | None = None,
    quantize: str | None = None,
    cache_dtype: str | None = None,
    speculate: str | None = None,
    speculate_tokens: int | None = None,
) -> LM:
    """Loads a model with its tokenizer and the sampling settings that its folder recommends.

    Args:
      path, dtype, mesh, adapter, quantize, cache_dtype, speculate, speculate_tokens: as for
        `from_pretrained`.
      tokenizer: as for `load_tokenizer`; None takes the one the run was trained with, or that of
        the model folder.

    Where `mesh` spans several processes, all of them call it with the same arguments.

    Raises:
      ConfigError: no model there, or no tokenizer that fits it; another model than in process 0.
    """
    with hosts.fail_together():
        opened = open_model(path, dtype)
        vocabulary = load_tokenizer(tokenizer or opened.tokenizer)
        if vocabulary.vocab_size > opened.cfg.vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocabulary.vocab_size} ids, the model "
                f"{opened.cfg.vocab_size}; pass the one it was trained with."
            )
        recommended = read_sampling(opened.place)
    if mesh is not None and hosts.spans_processes(mesh):
        options = {"quantize": quantize, "cache_dtype": cache_dtype, "adapter": str(adapter)}
        options |= {"mesh": dict(mesh.shape), "speculate": [speculate, speculate_tokens]}
        model = dataclasses.asdict(opened.cfg)
        hosts.require_same(options=options, model=model, weights=opened.fingerprint)
    limits = {"speculate": speculate, "speculate_tokens": speculate_tokens}
    with hosts.fail_together():
        model = pretrained.load(opened, mesh, adapter, quantize, cache_dtype, **limits)
    return LM(model, vocabulary, recommended)


class Chat:
    """A conversation.

    messages: what was said so far, {"role", "content"} each.
    """

    def __init__(self, lm: LM, system: str = "", sampling: Sampling | None = None):
        """`sampling`: of each answer.

        Raises:
          ConfigError: the tokenizer has neither a chat template nor chat tokens.
        """
        self._lm, self._sampling = lm, sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()
        lm.chat_ids([*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._opening)

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer.  What was read of it when the iterator is closed is what the
        conversation remembers, with its special tokens, such as the marks around a thought.

        Raises:
          ValueError: the conversation fills the model's positions; the question is then forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = self._lm.chat_ids(asked)
        if len(ids) >= self._lm.model.config.max_position:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model "
                f"{self._lm.model.config.max_position} positions; /reset starts a new one."
            )
        return self._remembered(asked, self._lm.stream_tokens(ids, self._sampling))

    def _remembered(
        self, asked: list[dict[str, str]], tokens: Iterator[tuple[str, int]]
    ) -> Iterator[str]:
        ids = []
        try:
            for piece, token_id in tokens:
                ids.append(token_id)
                yield piece
        finally:
            content = self._lm.said(ids, self._sampling)
            self.messages = [*asked, {"role": "assistant", "content": content}]


def _texts(
    tokens: Iterator[np.ndarray],
    decoder: StreamDecoder,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
) -> Iterator[tuple[str, int]]:
    """(piece, id) of each token; the piece of the last one also ends the text."""
    for number, token_B in enumerate(tokens, start=1):
        token_id = int(token_B[0])
        is_stop = token_id in stop_ids
        piece = "" if is_stop else decoder.push(token_id)
        if is_stop or number == max_new_tokens:
            piece += decoder.finish()
        yield piece, token_id
