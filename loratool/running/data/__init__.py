"""A user's own text as a model reads it: files of samples, and the tokens of each sample that count towards the loss.

A sample has one of these sets of keys:

- ``text``: every token counts.
- ``prompt`` and ``completion``: only the completion counts.
- ``messages``: only the assistant's turns count.

It is an object in a JSONL file or a JSON list, or a row of a CSV file, a Parquet file or a data set on the Hub. A ``.txt``
file is one text that is cut into windows. Other keys are ignored.
"""

from __future__ import annotations

from loratool.running.data.files import SUFFIXES, read_data
from loratool.running.data.samples import KEYS, Chat, Completion, Data, Document, Sample, Text, read_rows
from loratool.running.data.tokens import IGNORED, TokenizedSample, tokenize_data

__all__ = [
    "IGNORED",
    "KEYS",
    "SUFFIXES",
    "Chat",
    "Completion",
    "Data",
    "Document",
    "Sample",
    "Text",
    "TokenizedSample",
    "read_data",
    "read_rows",
    "tokenize_data",
]
