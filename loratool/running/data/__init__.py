"""A user's own text as a model reads it: files of samples, and of each sample the tokens that count.

A sample has ``text``, of which every token counts; or ``prompt`` and ``completion``, or ``messages``, of which what the
assistant says counts. It is an object of a JSONL file or of a JSON list, or a row of a CSV or Parquet file or of a data
set of the Hub. A ``.txt`` file is one text, cut into windows. Other keys are left alone.
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
