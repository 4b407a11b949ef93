"""Data sets from the Hub, through ``datasets`` and in its own cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from loratool.errors import DataError, LoratoolError, NotFoundError, quoted
from loratool.hub.client import ask_once
from loratool.hub.retry import is_unreachable

TABLES: Final = frozenset({"arrow", "csv", "json", "parquet", "text"})
"""The formats that are read. Data sets in other formats may hold pickles, images or audio."""

DEFAULT_SPLIT: Final = "train"


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split of a data set."""

    columns: Sequence[str]
    rows: Iterable[Mapping[str, Any]]


def fetch_table(repo: str, split: str | None = None, *, columns: Sequence[str], revision: str | None = None) -> Table:
    """Return one split of a data set on the Hub. Only those of `columns` that it has are read.

    Args:
        repo: the data set's id on the Hub.
        split: a name or slice as ``datasets`` spells it (``test``, ``train[:100]``); by default ``train``, or the only one.
        columns: the names of the columns to read.
        revision: a branch, tag or commit.

    Raises:
        NotFoundError: there is no such data set or split, or the Hub cannot be reached and the cache does not have it.
        DataError: the data set is not a table, or is damaged.
        LoratoolError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise LoratoolError(
            f"data sets on the Hub need packages that are not installed ({error}); pip install 'loratool[train]'"
        ) from None
    with _quiet(datasets), _by_the_cache_where_nobody_answers(datasets) as silence:
        try:
            builder = datasets.load_dataset_builder(repo, revision=revision)
            if builder.name not in TABLES:
                raise DataError(
                    f"the data set {quoted(repo)} is stored as {quoted(builder.name)}, but only "
                    f"{', '.join(sorted(TABLES))} are read; save it as a JSONL or Parquet file"
                )
            builder.download_and_prepare()
            chosen = split or _default_split(repo, list(builder.info.splits or ()))
            rows = builder.as_dataset(split=chosen)
            names = list(rows.column_names)
            return Table(names, rows.select_columns([name for name in names if name in columns]))
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise NotFoundError(
                f"{quoted(repo)} is neither a file nor a data set on the Hub or in its cache "
                f"({_first_line(silence or error)}); give a file, or go online once"
            ) from None
        except LoratoolError:
            raise
        except Exception as error:  # files from outside can make a library raise anything
            raise DataError(f"cannot read the data set {quoted(repo)}: {_first_line(error)}") from None


def _default_split(repo: str, splits: Sequence[str]) -> str:
    if DEFAULT_SPLIT in splits:
        return DEFAULT_SPLIT
    if len(splits) == 1:
        return splits[0]
    found = ", ".join(map(quoted, splits)) or "none"
    raise NotFoundError(
        f"the data set {quoted(repo)} has no split 'train'; its splits are {found}: name one as {repo}:SPLIT"
    )


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Silence warnings, progress bars and messages about retried requests."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _by_the_cache_where_nobody_answers(datasets: Any) -> Iterator[Exception | None]:
    """Set HF_HUB_OFFLINE in the block if the Hub cannot be reached, since ``datasets`` would retry for half a minute.

    Yields the error that showed that it cannot, or None.
    """
    from huggingface_hub import constants

    silence: Exception | None = None
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before):
        try:
            ask_once()
        except Exception as error:
            if not is_unreachable(error):
                raise
            silence = error
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield silence
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:240]
