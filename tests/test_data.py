"""Samples read from files of every format and from data sets, and what is refused in them, by its line or row."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_eval import CHATML, TURNS, counted, tiny_tokenizer, write_lines

from loratool.errors import DataError, LoratoolError, NotFoundError
from loratool.hub.data_sets import fetch_table
from loratool.library.resolving.resolve_data import resolve_data
from loratool.running.data import (
    IGNORED,
    Chat,
    Completion,
    Data,
    Text,
    TokenizedSample,
    read_data,
    read_rows,
    tokenize_data,
)

# No lone surrogates, and none of the characters that a CSV reader takes for the end of a line outside quotation marks.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())
Row = dict[str, Any]


def write_csv(file: Path, rows: Sequence[Row], separator: str = ",") -> Path:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: Sequence[Row], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, **options)
    return file


def write_list(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text(json.dumps(rows, indent=1))
    return file


def write(file: Path, rows: Sequence[Row]) -> Path:
    writers: dict[str, Callable[..., Path]] = {".csv": write_csv, ".parquet": write_parquet, ".json": write_list}
    if file.suffix == ".tsv":
        return write_csv(file, rows, "\t")
    return writers[file.suffix](file, rows)


def content(data: Data) -> list[tuple[Any, ...]]:
    """What the samples say, without their numbers."""
    found: list[tuple[Any, ...]] = []
    for sample in data.samples:
        match sample:
            case Completion(_, prompt, completion):
                found.append((prompt, completion))
            case Chat(_, messages):
                found.append(tuple(map(dict, messages)))
            case _:
                found.append((sample.text,))
    return found


# What is read


@given(rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), TEXTS), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json"])
def test_any_text_comes_out_of_each_format_as_it_went_in(
    suffix: str, rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / f"round-trip{suffix}"
    data = read_data(write(file, [{"source": 3, "prompt": prompt, "completion": said} for prompt, said in rows]))

    assert content(data) == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".PARQUET"])
def test_every_format_holds_every_kind_of_sample(suffix: str, tmp_path: Path) -> None:
    name = f"data{suffix}"
    for rows, expected in (
        ([{"text": "a cat"}, {"text": 'a\ndog, "sat"'}], [("a cat",), ('a\ndog, "sat"',)]),
        ([{"prompt": "", "completion": "hi", "note": ""}], [("", "hi")]),
    ):
        written = write(tmp_path / name.lower(), rows)
        assert content(read_data(written.rename(tmp_path / name))) == expected
    chat: Any = json.dumps(TURNS) if suffix in {".csv", ".tsv"} else TURNS
    written = write(tmp_path / name.lower(), [{"messages": chat}])
    assert content(read_data(written)) == [tuple(TURNS)]


def test_a_table_may_hold_several_kinds_where_the_other_cells_are_missing(tmp_path: Path) -> None:
    rows = [{"text": "a cat"}, {"prompt": "who", "completion": "me"}, {"messages": TURNS[1:3]}]
    keys = ("text", "prompt", "completion", "messages")
    file = write_parquet(tmp_path / "mixed.parquet", [{key: row.get(key) for key in keys} for row in rows])

    assert content(read_data(file)) == [("a cat",), ("who", "me"), tuple(TURNS[1:3])]


def test_samples_know_their_line_row_or_entry(tmp_path: Path) -> None:
    table = tmp_path / "lines.csv"
    table.write_bytes(b'\xef\xbb\xbftext\r\n"one\r\ntwo"\r\nthree\r\n')
    parquet = write_parquet(tmp_path / "rows.parquet", [{"text": "a"}, {"text": "b"}])
    entries = write_list(tmp_path / "entries.json", [{"text": "a"}, {"text": "b"}])

    assert read_data(table).samples == (Text(2, "one\r\ntwo"), Text(4, "three"))
    for data, place in ((read_data(table), "line"), (read_data(parquet), "row"), (read_data(entries), "entry")):
        last = data.samples[-1]
        assert isinstance(last, Text)
        assert str(data.place(last.line).wrong("is odd")).startswith(f"{place} {last.line} of '{data.file}' is odd")


def test_a_json_file_may_hold_an_object_a_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "lines.json", {"text": "a cat"}, {"text": "a dog"})

    assert read_data(file).samples == (Text(1, "a cat"), Text(2, "a dog"))


def test_a_large_parquet_file_is_read_in_its_order_whatever_its_row_groups(tmp_path: Path) -> None:
    rows = [{"text": f"sample {number}"} for number in range(5000)]
    file = write_parquet(tmp_path / "large.parquet", rows, row_group_size=700, compression="zstd")

    assert content(read_data(file)) == [(row["text"],) for row in rows]


def test_huge_cells_are_read_and_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    file = write_csv(tmp_path / "huge.csv", [{"text": "x" * 3_000_000}, {"text": "a dog"}])

    assert [len(sample.text) for sample in read_data(file).samples if isinstance(sample, Text)] == [3_000_000, 5]
    assert csv.field_size_limit() == limit


def test_an_unnamed_pipe_of_a_shell_is_read(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from loratool.running.data import read_data; "
    script = (
        f"{sys.executable} -c '{code} print(len(read_data(Path(sys.argv[1])).samples))' <(echo '{{\"text\": \"hi\"}}')"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == ("1\n", "")


# What is refused

UTF_16 = "text\na cat\n".encode("utf-16")
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty CSV": ("x.csv", b"", "is empty"),
    "a BOM alone": ("x.csv", b"\xef\xbb\xbf", "is empty"),
    "a CSV of a header": ("x.csv", b"text\n", "is empty"),
    "a CSV without header": ("x.csv", b"a cat\na dog\n", "has the columns 'a cat' but must have"),
    "a CSV lacking a column": ("x.csv", b"prompt,source\na,b\n", "has the columns 'prompt', 'source'"),
    "a CSV with semicolons": ("x.csv", b"prompt;completion\na;b\n", "separated by commas"),
    "a CSV with a column twice": ("x.csv", b"text,text\na,b\n", "two columns 'text'"),
    "a short row": ("x.csv", b"prompt,completion\na,b\nc\n", "line 3 of 'x.csv' has 1 cell, but the first line names 2 columns"),
    "a long row": ("x.csv", b"text\na\nb, c\n", "line 3 of 'x.csv' has 2 cells, but the first line names 1 column;"),
    "a blank row": ("x.csv", b"text\na\n\nb\n", "line 3 of 'x.csv' is empty"),
    "an empty cell": ("x.csv", b'text\na\n""\n', "line 3 of 'x.csv' has an empty 'text'"),
    "an open quotation mark": ("x.csv", b'text\na\n"b\nc\n', "line 3 of 'x.csv' is not CSV"),
    "a stray quotation mark": ("x.csv", b'text\n"a"b\n', "line 2 of 'x.csv' is not CSV"),
    "a CSV in Latin-1": ("x.csv", b"text\na cat\n" + b"ok\n" * 40_000 + b"caf\xe9\n", "line 40003 of 'x.csv' is not UTF-8"),
    "a CSV in UTF-16": ("x.csv", UTF_16, "line 1 of 'x.csv' is not UTF-8"),
    "a CSV of NULs": ("x.csv", b"\0" * 64, "has the columns"),
    "messages in a CSV that are Python": ("x.csv", b"messages\n\"[{'role': 1}]\"\n", "not JSON"),
    "messages in a CSV that are no list": ("x.csv", b"messages\n3\n", "not a list"),
    "an empty Parquet": ("x.parquet", b"", "not a complete Parquet file"),
    "a pickle named Parquet": ("x.parquet", pickle.dumps({"text": ["a"]}), "not a complete Parquet file"),
    "a CSV named Parquet": ("x.parquet", b"text\n" + b"a cat\n" * 10, "not a complete Parquet file"),
    "an empty JSON": ("x.json", b"", "is empty"),
    "an empty list": ("x.json", b"[]", "is empty"),
    "a list of numbers": ("x.json", b"[1, 2]", "entry 1 of 'x.json' is not an object"),
    "half a list": ("x.json", b'[{"text": "a"},', "is not JSON"),
    "a deep list": ("x.json", b"[" * 200_000, "is not JSON"),
    "a list with a bad entry": ("x.json", b'[{"text": "a"}, {"text": 1}]', "entry 2 of 'x.json' has a 'text' that is no"),
    "a list in Latin-1": ("x.json", b'[{"text": "a"},\n{"text": "\xe9"}]', "line 2 of 'x.json' is not UTF-8"),
    "a pickle named JSONL": ("x.jsonl", pickle.dumps({"text": ["a"]}), "line 1 of 'x.jsonl' is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_data_is_refused_where_it_is_wrong(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, raw, problem = BAD_FILES[case]
    Path(name).write_bytes(raw)
    with pytest.raises(DataError) as raised:
        read_data(Path(name))

    assert problem in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"text": [1, 2, 3]}, "row 1 of 'x.parquet' has a 'text' that is not a string"),
        ({"text": ["a", None]}, "row 2 of 'x.parquet' has none of the known keys"),
        ({"text": [b"\xff"]}, "row 1 of 'x.parquet' has a 'text' that is not a string"),
        ({"body": ["a"]}, "has the columns 'body'"),
        ({"text": ["a"], "prompt": ["b"], "completion": ["c"]}, "row 1 of 'x.parquet' has 'text' and 'prompt'"),
        ({"messages": [["user", "hi"]]}, "row 1 of 'x.parquet' has 'messages' that are not a list of objects"),
        ({"messages": [[{"role": "user", "content": "hi"}]]}, "no message with the role 'assistant'"),
        ({"text": pyarrow.array([], pyarrow.string())}, "has no rows"),
        ({}, "has the columns (none)"),
    ],
)
def test_a_table_of_other_things_is_refused_by_its_row(
    table: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table(table), "x.parquet")
    with pytest.raises(DataError, match=re.escape(problem)):
        read_data(Path("x.parquet"))


def test_a_parquet_text_of_broken_utf8_is_refused(tmp_path: Path) -> None:
    broken = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe"))
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet"):
        read_data(tmp_path / "x.parquet")


def test_a_damaged_parquet_file_gives_its_rows_or_one_clear_error(tmp_path: Path) -> None:
    file = write_parquet(
        tmp_path / "x.parquet", [{"text": f"sample {n} " * 9} for n in range(50)], compression="snappy"
    )
    whole, draw = file.read_bytes(), random.Random(6)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 30])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged[: draw.choice([len(whole), len(whole), draw.randrange(len(whole))])])
        try:
            assert read_data(file).samples
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.csv"))
        (tmp_path / "folder.parquet").mkdir()
        for name, problem in (
            ("pipe.jsonl", "is a named pipe"),
            ("socket.csv", "cannot read"),
            ("folder.parquet", "Is a directory"),
        ):
            with pytest.raises(DataError, match=problem):
                read_data(tmp_path / name)
    with pytest.raises(NotFoundError, match="there is no data"):
        read_data(tmp_path / "nothing.csv")


def test_without_pyarrow_the_extra_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "x.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LoratoolError, match=re.escape("pip install 'loratool[train]'")):
        read_data(file)


# Data sets of the Hub. ``datasets`` takes a folder of the same name for one, which is how they are tried without the Hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``someone/name`` is a data set, and a cache of its own."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "someone" / "name").mkdir(parents=True)
    return tmp_path / "someone" / "name"


COLUMNS = ("text", "prompt", "completion", "messages")


def test_a_data_set_is_read_by_split(hub: Path) -> None:
    write_parquet(hub / "train-00000.parquet", [{"text": f"a cat {n}", "label": n} for n in range(6)])
    write_parquet(hub / "test-00000.parquet", [{"text": "a dog", "label": 0}])

    def read(split: str | None) -> list[str]:
        table = fetch_table("someone/name", split, columns=COLUMNS)
        assert list(table.columns) == ["text", "label"]
        return [
            sample.text
            for sample in read_rows(Path("x"), table.columns, table.rows).samples
            if isinstance(sample, Text)
        ]

    assert read(None) == [f"a cat {n}" for n in range(6)]
    assert read("test") == ["a dog"]
    assert read("train[:2]") == ["a cat 0", "a cat 1"]
    with pytest.raises(DataError, match="someone/name"):
        read("nothing")


def test_a_data_set_of_chats_is_that_of_a_file(hub: Path, tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[1:3]}]
    file = write_lines(hub / "train.jsonl", *rows)
    table = fetch_table("someone/name", columns=COLUMNS)

    assert content(read_rows(Path("x"), table.columns, table.rows)) == content(read_data(file))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"name.py": b"raise SystemExit('run')", "train.jsonl": b'{"text": "a"}'}, "scripts are no longer supported"),
        ({"other.py": b"raise SystemExit('run')"}, "someone/name"),
        ({"train.pkl": pickle.dumps([{"text": "a"}])}, "someone/name"),
        ({"train.parquet": pickle.dumps([{"text": "a"}])}, "someone/name"),
        ({"train.jsonl": b'{"text": '}, "someone/name"),
        ({"one.tar": b"", "train/two.tar": b"\0" * 10240}, "someone/name"),
        ({}, "someone/name"),
        ({"validation.jsonl": b'{"text": "a"}', "test.jsonl": b'{"text": "a"}'}, "no split 'train'; its splits are"),
    ],
)
def test_a_data_set_runs_no_code_loads_no_pickle_and_says_what_is_wrong(
    files: dict[str, bytes], problem: str, hub: Path
) -> None:
    for name, raw in files.items():
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(raw)
    with pytest.raises(LoratoolError, match=problem) as raised:
        list(fetch_table("someone/name", columns=COLUMNS).rows)
    assert "\n" not in str(raised.value)


def test_where_the_hub_does_not_answer_it_is_asked_once_and_its_cache_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(NotFoundError, match=r"'someone/name' is neither .* in its cache .*refused.*; give a file"):
        fetch_table("someone/name", columns=COLUMNS)
    assert not (constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)
    assert slept == []


def test_a_name_is_a_file_before_it_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[Any, ...]] = []

    def record(repo: str, split: str | None, *, columns: Sequence[str], revision: str | None) -> Any:
        asked.append((repo, split, revision))
        raise NotFoundError("asked the Hub")

    monkeypatch.setattr("loratool.hub.data_sets.fetch_table", record)
    (tmp_path / "some").mkdir()
    write_lines(tmp_path / "some" / "file", {"text": "a"})

    assert content(resolve_data("some/file")) == [("a",)]
    for name in ("./some/one", "/some/one", "some/one.jsonl", "some/one.parquet", "some", "some/one/two", "é/one", ""):
        with pytest.raises(LoratoolError, match=r"there is no data|Is a directory"):
            resolve_data(name)
    assert asked == []
    for name in ("some/one", "some/one:test", "some/one@v1/x:train[:10%]"):
        with pytest.raises(NotFoundError, match="asked the Hub"):
            resolve_data(name)
    assert asked == [("some/one", None, None), ("some/one", "test", None), ("some/one", "train[:10%]", "v1/x")]


def test_a_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="'nobody/nothing' is neither a file nor a data set"):
        resolve_data("nobody/nothing")


# What is too long


def cut(rows: Sequence[Row], max_length: int, tmp_path: Path, **options: Any) -> list[TokenizedSample]:
    tokenizer = tiny_tokenizer(template=CHATML)
    return tokenize_data(read_data(write_lines(tmp_path / "cut.jsonl", *rows)), tokenizer, max_length, **options)


def test_a_sample_that_is_cut_is_the_beginning_of_itself(tmp_path: Path) -> None:
    rows = [
        {"text": "the cat sat on the mat"},
        {"text": "a dog"},
        {"prompt": "what sat", "completion": "the dog sat " * 9},
    ]
    whole = cut(rows, 1000, tmp_path)
    for length in (22, 25, 40):
        short = cut(rows, length, tmp_path, truncate=True)
        for before, after in zip(whole, short, strict=True):
            assert after.input_ids == before.input_ids[:length]
            assert after.labels == before.labels[:length]
            assert after.truncated == (len(before.input_ids) > length)
            assert after.scored_tokens >= 1
    assert not any(sample.truncated for sample in whole)
    assert IGNORED in whole[2].labels


def test_a_cut_that_would_leave_nothing_to_score_is_refused_by_its_line(tmp_path: Path) -> None:
    rows = [{"text": "a dog"}, {"prompt": "the mat " * 20, "completion": "the dog"}]
    with pytest.raises(DataError, match=r"line 2 of .* none of those counts"):
        cut(rows, 20, tmp_path, truncate=True)
    with pytest.raises(DataError, match=r"line 2 of .* or --truncate"):
        cut(rows, 20, tmp_path)


def test_the_first_token_that_may_be_kept_of_a_completion_is_enough(tmp_path: Path) -> None:
    rows = [{"prompt": "what sat", "completion": "the dog sat on the mat"}]
    (whole,) = cut(rows, 1000, tmp_path)
    first = next(place for place, label in enumerate(whole.labels) if label != IGNORED)
    (kept,) = cut(rows, first + 1, tmp_path, truncate=True)

    assert kept.scored_tokens == 1
    assert counted(kept, tiny_tokenizer()) in counted(whole, tiny_tokenizer())
    with pytest.raises(DataError, match="none of those counts"):
        cut(rows, first, tmp_path, truncate=True)


def test_a_row_too_long_is_named_as_a_row(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [{"text": "a dog"}, {"text": "the cat sat on the mat " * 5}])
    tokenizer: transformers.PreTrainedTokenizerBase = tiny_tokenizer()
    with pytest.raises(DataError, match=r"row 2 of .*x\.parquet' is \d+ tokens long and 16 are allowed"):
        tokenize_data(read_data(file), tokenizer, 16)


@pytest.mark.parametrize(("name", "lines"), [("pirate", 80), ("legal", 76)])
def test_the_examples_are_whole_and_ask_nothing_twice(name: str, lines: int) -> None:
    data = read_data(Path(__file__).parents[1] / "examples" / f"{name}.jsonl")
    asked = {sample.prompt for sample in data.samples if isinstance(sample, Completion)}

    assert len(data.samples) == len(asked) == lines
