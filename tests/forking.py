"""Programs of tests that run in a process of their own, without the seconds that each would take to import torch.

One process for each worker of pytest imports what they need and forks a child for each program. This file is its program, too.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Forker:
    """Runs files as programs, in forks of a process that has imported torch and loratool."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, file: str, *words: str, folder: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a file with `words`, in `folder`, under this process's environment and what `environment` changes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        out, err = folder / "program.out", folder / "program.err"
        request = {
            "words": [file, *words],
            "environment": {**os.environ, **(environment or {})},
            "folder": str(folder),
            "streams": [str(out), str(err)],
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        done = subprocess.CompletedProcess(request["words"], status, out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
        return done


@contextmanager
def forker() -> Iterator[Forker]:
    """Start the process; it ends with the block."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Forker(process)


def serve() -> None:
    """Fork a child for each request on stdin, one after the other, and tell its exit status."""
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    import loratool.library.bases
    import loratool.library.merge
    import loratool.library.truncate
    import loratool.library.unmerge  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        assert len(os.listdir("/proc/self/task")) == 1, "a child that is forked beside other threads may wait for ever"
        pid = os.fork()
        if pid == 0:
            become(**request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(words: list[str], environment: dict[str, str], folder: str, streams: list[str]) -> Any:
    """Be the program, to its end."""
    status = 1
    try:
        for number, file in zip((1, 2), streams, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        os.fsync = lambda fd: None  # a process that is killed loses nothing that it wrote; only a power cut does
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve()
