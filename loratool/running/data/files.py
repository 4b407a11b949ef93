"""Files of samples: JSONL, JSON lists, CSV, Parquet, and plain text. Reading one needs no torch and executes nothing."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from loratool.errors import DataError, LoratoolError, NotFoundError, quoted
from loratool.running.data.samples import KEYS, Data, Document, Place, Sample, check_columns, read_rows, sample_of

FORMATS: Final = "a JSONL, JSON, CSV, Parquet or .txt file"
ADVICE: Final = "write one JSON object per line, or name the file .txt if it is plain text"
SUFFIXES: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_ROWS_AT_ONCE: Final = 1024
_LONGEST_CELL: Final = 1 << 30
"""The longest cell of a CSV file, in characters. The default of Python's csv is 131,072."""


def read_data(file: Path) -> Data:
    """Read a file of samples: ``.csv``, ``.tsv``, ``.parquet``, ``.json`` or ``.txt``; any other suffix is read as JSONL.

    A JSON file that does not begin with a list is read as JSONL. The first line of a CSV file names the columns, and
    ``messages`` in it are JSON.

    Raises:
        NotFoundError: the file does not exist.
        DataError: the file cannot be read, is empty, or has an invalid sample; the message names its line.
        LoratoolError: the file is Parquet, and pyarrow is not installed.
    """
    try:
        _refuse_no_file(file)
        data = _READERS.get(file.suffix.lower(), _json_lines)(file)
    except FileNotFoundError:
        raise NotFoundError(f"there is no data at {quoted(file)}; give {FORMATS}") from None
    except (OSError, ValueError, MemoryError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
        raise DataError(f"cannot read {quoted(file)}: {problem}; give {FORMATS}") from None
    if not data.samples:
        raise DataError(f"{quoted(file)} is empty; give it at least one sample")
    return data


def _refuse_no_file(file: Path) -> None:
    """Refuse devices and named pipes, which could block or never end.

    An unnamed pipe, which a shell makes for ``<(...)``, has a writer and is read.
    """
    mode = file.stat().st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise DataError(f"{quoted(file)} is a device; give {FORMATS}")
    if stat.S_ISFIFO(mode) and not file.resolve().name.startswith("pipe:"):
        raise DataError(f"{quoted(file)} is a named pipe; give {FORMATS}")


def _document(file: Path) -> Data:
    content = file.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content, error) from None
    return Data(file, (Document(text),) if text.strip() else ())


def _json_lines(file: Path) -> Data:
    with open(file, "rb") as stream:
        return Data(file, tuple(_lines(stream, file)))


def _lines(stream: BinaryIO, file: Path) -> Iterator[Sample]:
    for number, line in enumerate(stream, 1):
        place = Place(file, "line", number)
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if not content.strip():
            raise place.wrong("is empty; remove it")
        entry = _parsed(content, place)
        if not isinstance(entry, dict):
            raise place.wrong(f"is JSON but not an object; {ADVICE}")
        yield sample_of(entry, place)


def _parsed(content: bytes | str, place: Place) -> object:
    try:
        return json.loads(content if isinstance(content, str) else content.decode())
    except (ValueError, RecursionError) as error:
        raise place.wrong(f"is not JSON ({_json_problem(error)}); {ADVICE}") from None


def _json_problem(error: Exception) -> str:
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _json(file: Path) -> Data:
    with open(file, "rb") as stream:
        start = stream.read(len(_BYTE_ORDER_MARK))
        beginning = (start.removeprefix(_BYTE_ORDER_MARK) + stream.read(4096)).lstrip()
        if not beginning.startswith(b"["):
            stream.seek(0)
            return Data(file, tuple(_lines(stream, file)))
        stream.seek(0)
        content = stream.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        entries = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content, error) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{quoted(file)} is not JSON ({_json_problem(error)}); write a list of objects, or one object per line"
        ) from None
    return Data(file, tuple(_entries(entries, file)), "entry")


def _entries(entries: list[object], file: Path) -> Iterator[Sample]:
    for number, entry in enumerate(entries, 1):
        place = Place(file, "entry", number)
        if not isinstance(entry, dict):
            raise place.wrong("is not an object; write a list of objects")
        yield sample_of(entry, place)


def _csv(file: Path) -> Data:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream, _long_cells():
            return Data(file, tuple(_csv_rows(stream, file)))
    except UnicodeDecodeError:
        content = file.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(file, content, error) from None
        raise


@contextmanager
def _long_cells() -> Iterator[None]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_rows(stream: Any, file: Path) -> Iterator[Sample]:
    """Yield the rows; the place of each is the line on which it begins."""
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(stream, delimiter=separator, strict=True)
    line = 1
    try:
        columns = next(reader, None)
        if columns is None:
            return
        check_columns(
            file, columns, f"name them in the first line, separated by {'tabs' if separator == chr(9) else 'commas'}"
        )
        line = reader.line_num + 1
        for cells in reader:
            yield sample_of(_csv_row(columns, cells, Place(file, "line", line)), Place(file, "line", line))
            line = reader.line_num + 1
    except csv.Error as error:
        raise Place(file, "line", line).wrong(f"is not CSV ({error}); fix its quotation marks") from None


def _csv_row(columns: list[str], cells: list[str], place: Place) -> Mapping[str, Any]:
    if not cells:
        raise place.wrong("is empty; remove it")
    if len(cells) != len(columns):
        raise place.wrong(
            f"has {len(cells):,} {'cell' if len(cells) == 1 else 'cells'}, but the first line names {len(columns):,} "
            f"{'column' if len(columns) == 1 else 'columns'}; put text that contains a separator in quotation marks"
        )
    row: dict[str, Any] = dict(zip(columns, cells, strict=True))
    if "messages" in row:
        try:
            row["messages"] = json.loads(row["messages"])
        except (ValueError, RecursionError) as error:
            raise place.wrong(f"has 'messages' that are not JSON ({_json_problem(error)}); fix them") from None
    return row


def _parquet(file: Path) -> Data:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise LoratoolError(
            f"a Parquet file needs packages that are not installed ({error}); pip install 'loratool[train]'"
        ) from None
    with open(file, "rb") as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = table.schema_arrow.names
            check_columns(file, columns)
            wanted = [column for column in columns if column in KEYS]
            batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted)
            rows = (cast("Mapping[str, Any]", row) for batch in batches for row in batch.to_pylist())
            return read_rows(file, columns, rows)
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            raise DataError(
                f"{quoted(file)} is not a complete Parquet file ({_first_line(error)}); write it again"
            ) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:240]


def _not_utf8(file: Path, content: bytes, error: UnicodeDecodeError) -> DataError:
    return Place(file, "line", content.count(b"\n", 0, error.start) + 1).wrong("is not UTF-8; convert the file")


_READERS: Final = {
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _document,
}
