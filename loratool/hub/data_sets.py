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
"""The formats that are read; a data set in any other could hold pickles, pictures or sound."""

DEFAULT_SPLIT: Final = "train"


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split of a data set."""

    columns: Sequence[str]
    rows: Iterable[Mapping[str, Any]]


def fetch_table(repo: str, split: str | None = None, *, columns: Sequence[str], revision: str | None = None) -> Table:
    """One split of a data set of the Hub, of whose rows only `columns` are read, where it has them.

    Args:
        split: as ``datasets`` names and slices it (``test``, ``train[:100]``); by default ``train``, or the only one.

    Raises:
        NotFoundError: there is no such data set or split, or the Hub cannot be reached.
        DataError: it is stored in another format than a table, or is damaged.
        LoratoolError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise LoratoolError(
            f"a data set of the Hub needs packages that are not installed ({error}); pip install 'loratool[train]'"
        ) from None
    with _quiet(datasets), _by_the_cache_where_nobody_answers(datasets) as silence:
        try:
            builder = datasets.load_dataset_builder(repo, revision=revision)
            if builder.name not in TABLES:
                raise DataError(
                    f"the data set {quoted(repo)} is stored as {quoted(builder.name)}, and {', '.join(sorted(TABLES))} are "
                    "read; save it as a JSONL or Parquet file"
                )
            builder.download_and_prepare()
            chosen = split or _default_split(repo, list(builder.info.splits or ()))
            rows = builder.as_dataset(split=chosen)
            names = list(rows.column_names)
            return Table(names, rows.select_columns([name for name in names if name in columns]))
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise NotFoundError(
                f"{quoted(repo)} is neither a file nor a data set that the Hub gives or its cache holds "
                f"({_first_line(silence or error)}); give a file, or go online once"
            ) from None
        except LoratoolError:
            raise
        except Exception as error:  # whatever files from outside can make a library raise
            raise DataError(f"cannot read the data set {quoted(repo)}: {_first_line(error)}") from None


def _default_split(repo: str, splits: Sequence[str]) -> str:
    if DEFAULT_SPLIT in splits:
        return DEFAULT_SPLIT
    if len(splits) == 1:
        return splits[0]
    found = ", ".join(map(quoted, splits)) or "none"
    raise NotFoundError(f"the data set {quoted(repo)} has no split 'train' but {found}; name one as {repo}:SPLIT")


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without warnings, progress bars, and word of each request that is tried again."""
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
    """As with HF_HUB_OFFLINE where the Hub cannot be reached, which ``datasets`` asks for half a minute otherwise.

    Gives what says that it cannot.
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
