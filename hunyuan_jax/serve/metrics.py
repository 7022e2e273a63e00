"""Figures of the server in Prometheus' text format, under the names of vLLM."""

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from hunyuan_jax.infer.request import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
            7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
            1.0, 2.5, 5.0, 10.0)  # fmt: skip


class Histogram:
    """Counts of values by upper bounds."""

    def __init__(self, bounds: Sequence[float] = _SECONDS):
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts a value, `count` times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def lines(self, name: str, label: str) -> Iterator[str]:
        """The samples of this histogram."""
        total = 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            shown = "+Inf" if bound == math.inf else repr(float(bound))
            yield f'{name}_bucket{{{label},le="{shown}"}} {total}'
        yield f"{name}_sum{{{label}}} {self._sum!r}"
        yield f"{name}_count{{{label}}} {total}"


class Metrics:
    """What the server has counted since it started.

    time_to_first_token, between_tokens, whole_request: seconds; finished: choices by
    finish_reason; answers: responses by status; num_queue_full: requests that found the engine's
    queue full.
    """

    def __init__(self, model_name: str):
        shown = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._label = f'model_name="{shown}"'
        self.time_to_first_token = Histogram()
        self.between_tokens = Histogram(_BETWEEN)
        self.whole_request = Histogram()
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self.answers: Counter[int] = Counter()
        self.num_queue_full = 0

    def text(self, stats: Stats) -> str:
        """All figures, those of the engine included."""
        used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        lines: list[str] = []
        for name, kind, meaning, value in (
            ("num_requests_running", "gauge", "Choices that are computed.", stats.running),
            ("num_requests_waiting", "gauge", "Choices that wait for a row.", stats.waiting),
            ("kv_cache_usage_perc", "gauge", "Share of the cache's pages in use.", used),
            ("num_preemptions_total", "counter", "Choices put back.", stats.preemptions),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", stats.prompt_tokens),
            ("generation_tokens_total", "counter", "New tokens.", stats.generated_tokens),
            (
                "prefix_cache_queries_total",
                "counter",
                "Prompt tokens looked up in the cache.",
                stats.prefix_queries,
            ),
            (
                "prefix_cache_hits_total",
                "counter",
                "Prompt tokens found in the cache.",
                stats.prefix_hits,
            ),
            ("spec_decode_num_drafts_total", "counter", "Drafts verified.", stats.drafts),
            (
                "spec_decode_num_draft_tokens_total",
                "counter",
                "Tokens of drafts.",
                stats.draft_tokens,
            ),
            (
                "spec_decode_num_accepted_tokens_total",
                "counter",
                "Tokens of drafts that were drawn.",
                stats.accepted_tokens,
            ),
        ):
            lines += self._head(f"vllm:{name}", kind, meaning)
            lines.append(f"vllm:{name}{{{self._label}}} {value}")
        lines += self._head("vllm:request_success_total", "counter", "Choices that have ended.")
        lines += [
            f'vllm:request_success_total{{{self._label},finished_reason="{reason}"}} {count}'
            for reason, count in self.finished.items()
        ]
        for name, meaning, histogram in (
            (
                "time_to_first_token_seconds",
                "From request to first token.",
                self.time_to_first_token,
            ),
            ("inter_token_latency_seconds", "Between tokens.", self.between_tokens),
            ("e2e_request_latency_seconds", "From request to last token.", self.whole_request),
        ):
            lines += self._head(f"vllm:{name}", "histogram", meaning)
            lines += histogram.lines(f"vllm:{name}", self._label)
        for name, kind, meaning, value in (
            ("compilations_total", "counter", "Compilations since warm-up.", stats.compilations),
            ("device_idle_share", "gauge", "Idle share while there was work.", stats.idle_share),
            (
                "queue_full_total",
                "counter",
                "Requests that found the queue full.",
                self.num_queue_full,
            ),
            ("pages", "gauge", "Pages of the cache.", stats.pages_total),
            ("pages_used", "gauge", "Pages in use.", stats.pages_used),
            ("pages_cached", "gauge", "Unused pages that may be shared.", stats.pages_cached),
        ):
            lines += self._head(f"hunyuan_jax:{name}", kind, meaning)
            lines.append(f"hunyuan_jax:{name}{{{self._label}}} {value}")
        lines += self._head("hunyuan_jax:http_responses_total", "counter", "Answers by status.")
        lines += [
            f'hunyuan_jax:http_responses_total{{{self._label},status="{status}"}} {count}'
            for status, count in sorted(self.answers.items())
        ]
        return "\n".join(lines) + "\n"

    def _head(self, name: str, kind: str, meaning: str) -> list[str]:
        return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
