"""Helpers of the data tests: small token sources, and checks that hold for any batch."""

import collections
import contextlib
import itertools
import math

import numpy as np

from hunyuan_jax.config import DataConfig, PhaseConfig, SourceConfig, TrainConfig
from hunyuan_jax.data import loader, stream
from hunyuan_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_weights": np.float32,
}


def document_ids(text):
    return [TOKENIZER.bos_id, *text.encode(), TOKENIZER.eos_id]


def order_of(
    *sources,
    batch_size=1,
    seq_len=8,
    seed=0,
    fraction=0.0,
    weights=((1.0,),),
    starts=(0.0,),
    num_steps=100,
):
    """Returns the stream of a run over token sources 's0', 's1', ..."""
    names = [f"s{i}" for i in range(len(sources))]
    data = DataConfig(
        sources=tuple(SourceConfig(name, "") for name in names),
        phases=tuple(
            PhaseConfig(f"p{i}", row, start)
            for i, (row, start) in enumerate(zip(weights, starts, strict=True))
        ),
        validation_fraction=fraction,
    )
    corpus = loader.Corpus(tuple(names), sources, TOKENIZER)
    return loader.PackedRows(
        corpus,
        data,
        TrainConfig(num_steps=num_steps, batch_size=batch_size, seq_len=seq_len, seed=seed),
    )


@contextlib.contextmanager
def iterating(order, **options):
    with contextlib.closing(stream.read_ahead(order, **options)) as batches:
        yield batches


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def assert_shapes(batch, shape):
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape, dtype) for name, dtype in FIELDS.items()
    }


def expected_pairs(texts):
    return collections.Counter(
        pair for text in texts for pair in itertools.pairwise(document_ids(text))
    )


def counted_pairs(batches):
    """Returns the (token, target) pairs with a loss weight."""
    return collections.Counter(
        pair
        for batch in batches
        for pair in zip(
            batch["tokens"][batch["loss_weights"] == 1].tolist(),
            batch["targets"][batch["loss_weights"] == 1].tolist(),
            strict=True,
        )
    )


def num_rows(texts, seq_len):
    return math.ceil(expected_pairs(texts).total() / seq_len)


def pieces_of(texts, seq_len):
    """Returns every run of ids that a segment with its last target may be."""
    whole = [document_ids(text) for text in texts]
    return {
        tuple(ids[i:j])
        for ids in whole
        for i in range(len(ids))
        for j in range(i + 2, min(i + 2 + seq_len, len(ids) + 1))
    }


def check_row(row, pieces):
    segment_ids, num_pieces = row["segment_ids"], row["segment_ids"].max()
    assert segment_ids[segment_ids > 0].tolist() == sorted(segment_ids[segment_ids > 0])
    assert set(segment_ids[segment_ids > 0]) == set(range(1, num_pieces + 1))
    np.testing.assert_array_equal(row["loss_weights"], segment_ids > 0)
    is_padding = segment_ids == 0
    assert not is_padding[: np.count_nonzero(~is_padding)].any()  # padding is at the end
    assert set(row["tokens"][is_padding]) | set(row["targets"][is_padding]) <= {TOKENIZER.pad_id}
    assert not row["positions"][is_padding].any()
    for segment in range(1, num_pieces + 1):
        ids, targets = (
            row["tokens"][segment_ids == segment],
            row["targets"][segment_ids == segment],
        )
        np.testing.assert_array_equal(
            row["positions"][segment_ids == segment], np.arange(len(ids))
        )
        # The last target belongs to the same document.
        assert (*ids.tolist(), int(targets[-1])) in pieces
        np.testing.assert_array_equal(ids[1:], targets[:-1])
