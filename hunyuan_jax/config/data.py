"""Training text and its tokenizer (docs/data.md)."""

import dataclasses

from hunyuan_jax.config.section import Section, require
from hunyuan_jax.files import AnyPath


@dataclasses.dataclass(frozen=True)
class SourceConfig(Section):
    """One source of a mixture."""

    section = "data.sources"

    name: str
    """Name in logs and metrics."""
    path: AnyPath
    """Where its text is, as for `data.source`."""
    min_tokens: int = 0
    """Take only documents of at least this many tokens, bos and eos included."""
    max_tokens: int = 0
    """Take only documents of at most this many tokens; 0 = no limit."""


@dataclasses.dataclass(frozen=True)
class PhaseConfig(Section):
    """A phase of the run and the weight of each source in it."""

    section = "data.phases"

    name: str
    """Name in logs and metrics."""
    weights: tuple[float, ...]
    """One weight for each of `data.sources`, in their order; only their ratios count."""
    start: float = 0.0
    """Share of `train.num_steps` after which the phase begins."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Training text and tokenizer."""

    section = "data"

    source: AnyPath = "stdlib"
    """"stdlib" (Python's standard library), a folder, file or glob of text, or token shards."""
    sources: tuple[SourceConfig, ...] = ()
    """Sources of a mixture, instead of `source`."""
    phases: tuple[PhaseConfig, ...] = ()
    """Phases of a mixture, in order."""
    tokenizer: AnyPath = "byte"
    """"byte", the path of a model folder, tokenizer.json or tiktoken ranks file, or a hub id."""
    text_field: str = "text"
    """Field of a .jsonl row, or column of a .parquet file, that holds the text."""
    validation_fraction: float = 0.02
    """Share of the documents of each source that is held out."""
    max_bad_fraction: float = 0.01
    """Share of unusable rows (of at least 1000) above which the run stops."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        for name in ("validation_fraction", "max_bad_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"config.data.{name} = {value} must be in [0, 1).")
        names = [source.name for source in self.sources]
        starts = [phase.start for phase in self.phases]
        require(
            len(set(names)) == len(names) and "" not in names,
            f"config.data.sources are named {names}; names must differ and not be empty.",
        )
        for source in self.sources:
            limits = f"min_tokens = {source.min_tokens} and max_tokens = {source.max_tokens}"
            require(
                min(source.min_tokens, source.max_tokens) >= 0
                and (not source.max_tokens or source.min_tokens <= source.max_tokens),
                f"config.data.sources[{source.name!r}] has {limits}; neither may be negative, nor "
                "the first above the second, unless that is 0: no limit.",
            )
        require(
            bool(names) == bool(starts),
            f"config.data has {len(names)} sources and {len(starts)} phases; a mixture needs both "
            "(one phase is enough), config.data.source alone needs neither.",
        )
        require(
            not names or self.source == DataConfig.source,
            f"config.data.source = {self.source!r} and config.data.sources {names} exclude each "
            "other; list it in sources, or leave it out.",
        )
        require(
            not starts or (starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1),
            f"config.data.phases start at {starts}; shares of the run must rise from 0 and stay "
            "below 1.",
        )
        for phase in self.phases:
            require(
                len(phase.weights) == len(names)
                and min(phase.weights) >= 0
                and sum(phase.weights) > 0,
                f"config.data.phases: {phase.name!r} has weights {phase.weights}; it needs one "
                f"for each of the sources {names}, none negative and not all 0.",
            )


def quarter_long(corpus: str, long_from: int, tokenizer: str = DataConfig.tokenizer) -> DataConfig:
    """A quarter of the rows from the documents of a corpus of at least `long_from` tokens, the
    others from all shorter ones: the text of Hunyuan-Large's long-context stages.
    """
    return DataConfig(
        sources=(
            SourceConfig("long", corpus, min_tokens=long_from),
            SourceConfig("normal", corpus, max_tokens=long_from - 1),
        ),
        phases=(PhaseConfig("all", (0.25, 0.75)),),
        tokenizer=tokenizer,
    )
