"""Data for fine-tuning: rated sentences and the user's own chat samples, encoded and put into batches."""

from experiments.data.batches import Batch, Batches, Bucketed, Packed, gather_loss_positions
from experiments.data.encoding import Encoded, Encodings, encode_prompt, encode_samples
from experiments.data.messages import BadLine, Sample, read_jsonl, read_sentiment, sentiment_sample
from experiments.data.sentiment import (
    DownloadError,
    Example,
    count_examples,
    load_sentiment,
    take_examples,
)
from experiments.data.splits import split_of

__all__ = [
    "BadLine",
    "Batch",
    "Batches",
    "Bucketed",
    "DownloadError",
    "Encoded",
    "Encodings",
    "Example",
    "Packed",
    "Sample",
    "count_examples",
    "encode_prompt",
    "encode_samples",
    "gather_loss_positions",
    "load_sentiment",
    "read_jsonl",
    "read_sentiment",
    "sentiment_sample",
    "split_of",
    "take_examples",
]
