"""Real signals sent to real commands at moments spread over each run, and what each of them left.

A server process imports everything once and forks a child for each try; the child runs the command line and is struck by a
signal at a call of its main thread whose number is drawn by a seed. Then the same command is run again, and has to come to
the same bytes as one that nothing struck. Run as a program it does this at length, for all commands,
and with ``--processes`` in processes of their own, which import everything themselves:

    python tests/interrupting.py --tries 50 [--processes] [COMMAND...]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interrupted_commands import CASES, ONLINE, TRAIN, Case, build

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST = 60.0
"""Seconds after which a child that was struck is taken for one that hangs."""

ENDED = re.compile(r"(Interrupted|Stopped)[^\n]*")
NOISE = re.compile(r"note: |step \d|Going on|Stopping after|Finishing|\S.*\bwarn", re.IGNORECASE)
"""Lines on stderr that a run may print before it is struck."""


# The state of a folder and its catalogue.


def files_in(work: Path) -> set[str]:
    """Every file beside the home, and every empty folder."""
    found = set()
    for path in work.rglob("*"):
        name = str(path.relative_to(work))
        if name.split("/")[0] in {"home", "hf"}:
            continue
        if not path.is_dir():
            found.add(name)
        elif not any(path.iterdir()):
            found.add(f"{name}/")
    return found


def catalogued(work: Path) -> dict[str, list[Any]]:
    """What the catalogue says of adapters, bases and merges."""
    queries = {
        "adapters": "select name, version, sha256 from adapters order by 1, 2",
        "bases": "select name, fingerprint from bases order by 1",
        "merges": "select output, state, in_place, output_fingerprint from merges order by id",
        "tags": "select adapter_id, tag from tags order by 1, 2",
        "places": "select adapter_id, kind, store_key, path from locations order by 1, 2, 3, 4",
        "trash": "select name, version, sha256, store_key from removed_adapters order by 1, 2",
    }
    database = work / "home" / "registry.db"
    if not database.exists():
        return {table: [] for table in queries}
    with sqlite3.connect(database) as connection:
        names = {row[0] for row in connection.execute("select name from sqlite_master")}
        if "removed_adapters" not in names:
            return {table: [] for table in queries}
        return {table: [list(row) for row in connection.execute(query)] for table, query in queries.items()}


def leftovers(work: Path) -> list[str]:
    """What no run should leave: partial outputs, journals, and what the home keeps of runs that ended."""
    home = work / "home"
    found = [str(path.relative_to(work)) for path in work.rglob("*.loratool-*")]
    for pattern in ("running/*", "store/tmp/*", "digests/*.tmp"):
        found += [str(path.relative_to(work)) for path in home.glob(pattern)]
    found += [str(run.relative_to(work)) for run in home.glob("runs/*") if not (run / "state.safetensors").exists()]
    return found


def stored(work: Path) -> set[str]:
    """What the store holds."""
    store = work / "home" / "store"
    return {str(path.relative_to(store)) for path in store.rglob("*.safetensors")}


def bytes_in(work: Path) -> dict[str, str]:
    """The digest of every file beside the home."""
    files = [name for name in files_in(work) if (work / name).is_file()]
    return {name: hashlib.sha256((work / name).read_bytes()).hexdigest() for name in files}


def look(work: Path) -> dict[str, Any]:
    return {"files": files_in(work), "catalogue": catalogued(work), "stored": stored(work), "bytes": bytes_in(work)}


def loads_whole(folder: Path) -> bool:
    """Whether a strict reader takes every shard, or refuses: only a change under way may make it refuse."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            opened.keys()
    return True


# Running a command in a forked child.


def call_at(number: int, act: Callable[[], None]) -> Callable[[], int]:
    """Call `act` at the main thread's call of this number; returns a function that tells the count so far."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count == number:
                act()

    sys.setprofile(profile)
    return lambda: count


def see_through_strikes() -> None:
    """Have the signals' handler look at the frame that is struck, not at those of this file that strike it."""
    from loratool import interrupts

    handle = interrupts._raise_where_it_does_no_harm

    def handle_below(number: signal.Signals, frame: Any) -> None:
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        handle(number, frame)

    interrupts._raise_where_it_does_no_harm = handle_below


def run_words(words: str, work: Path, out: Path, arm: Callable[[], Callable[[], int]] | None = None) -> int:
    """Fork a child that runs the command line in `work`; its process id."""
    from test_crash import _wait_to_be_alone

    _wait_to_be_alone()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child handles them
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return pid
    os.chdir(work)
    sink = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["loratool", *words.split()]
    from loratool import __main__, cli, interrupts

    interrupts.install()  # as the command does first of all
    see_through_strikes()
    run = cli.run
    cli.run = lambda: (signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS), run())
    status = 70
    counted = arm() if arm else lambda: 0
    exit_now = os._exit

    def leave(code: int) -> None:
        sys.setprofile(None)
        (out.parent / "count").write_text(str(counted()))
        exit_now(code)

    os._exit = leave
    try:
        __main__.main()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    leave(status)
    raise AssertionError


def ended(pid: int, seconds: float = LONGEST) -> int:
    """How a child ended: its exit status, minus the number of the signal that killed it, or 1000 where it hangs."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 1000
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


@dataclass
class Strike:
    """What one try came to; `wrong` says everything that should not be."""

    case: str
    at: str
    signal: str
    status: int
    said: str
    wrong: list[str] = field(default_factory=list)


class Server:
    """Strikes commands, each time from the same start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.source = folder / "source"
        self.out = folder / "out"

    def start(self, source: Path) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(source, self.work, symlinks=True)

    def run(self, words: str, arm: Callable[[], Callable[[], int]] | None = None) -> int:
        return ended(run_words(words, self.work, self.out, arm))

    def must(self, words: str) -> None:
        status = self.run(words)
        assert status == 0, f"{words}: {status}\n{self.out.read_text()[-2000:]}"

    def prepare(self, case: Case) -> Path:
        """The folder from which every try of a case starts."""
        self.start(self.source)
        for words in case.before:
            if case.needs and words == case.before[-1]:
                self._stop_with_a_state(words, case.needs)
            else:
                self.must(words)
        prepared = self.folder / "prepared"
        shutil.rmtree(prepared, ignore_errors=True)
        shutil.copytree(self.work, prepared, symlinks=True)
        return prepared

    def _stop_with_a_state(self, words: str, needed: str) -> None:
        """Kill a run when it has kept a state, so that another can go on from it."""
        pid = run_words(words, self.work, self.out)
        while not (self.work / needed).exists():
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), self.out.read_text()
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def strikes(self, name: str, tries: int, seed: int, processes: bool = False) -> Iterator[Strike]:
        case = CASES[name]
        chance = random.Random(f"{name} {seed}")
        prepared = self.prepare(case)
        if not processes:
            self._warm(case.of("warm"))
            gc.freeze()
        self.start(prepared)
        before = look(self.work)
        timed = "train" in name  # it makes millions of calls
        began = time.monotonic()
        whole = case.of("whole")
        status = self._process(whole) if processes else self.run(whole, None if timed else _counting)
        assert status == 0, self.out.read_text()
        seconds = time.monotonic() - began
        calls = 0 if processes or timed else int((self.folder / "count").read_text())
        after = look(self.work)
        assert before != after, f"{case.words} changed nothing"
        for turn in range(tries):
            number, words = chance.choices(SIGNALS, (3, 2, 1))[0], case.of(str(turn))
            twice = chance.random() < 0.3
            self.start(prepared)
            delay = seconds * (turn + chance.random()) / tries
            if processes:
                at, status = f"{delay:.3f} s", self._process(words, delay, number, twice)
            elif timed:
                at, status = f"{delay:.3f} s", self._struck_after(delay, words, number, twice)
            else:
                moment = int(calls * (turn + chance.random()) / tries) + 1
                at = f"call {moment} of {calls}"
                status = self.run(words, lambda: call_at(moment, _striking(number, twice)))  # noqa: B023
            strike = Strike(name, at, number.name + (" twice" if twice else ""), status, self.out.read_text())
            self.judge(strike, number, before, after, processes=processes)
            self.judge_again(strike, words, before, after)
            yield strike

    def _warm(self, words: str) -> None:
        """Run a command in this process: what it imports and compiles on the first use is inherited by every child."""
        from loratool.cli import cli

        os.chdir(self.work)
        with open(self.out, "w") as sink, redirect_stdout(sink), redirect_stderr(sink), suppress(SystemExit):
            cli.main(words.split(), prog_name="loratool", standalone_mode=False)
        os.chdir(self.folder)

    def _struck_after(self, delay: float, words: str, number: signal.Signals, twice: bool) -> int:
        pid = run_words(words, self.work, self.out)
        for pause in (delay, 0.01) if twice else (delay,):
            time.sleep(pause)
            os.kill(pid, number)
        return ended(pid)

    def _process(self, words: str, delay: float | None = None, number: signal.Signals = signal.SIGINT,
                 twice: bool = False) -> int:  # fmt: skip
        with open(self.out, "w") as sink:
            program = (
                "import signal as s; s.signal(2, s.default_int_handler); s.signal(1, s.SIG_DFL); s.signal(15, s.SIG_DFL)\n"
                "from loratool.__main__ import main; main()"
            )
            child = subprocess.Popen(
                [sys.executable, "-c", program, *words.split()], cwd=self.work, stdout=sink, stderr=sink
            )
        if delay is not None:
            for pause in (delay, 0.01) if twice else (delay,):
                try:
                    child.wait(pause)
                except subprocess.TimeoutExpired:
                    child.send_signal(number)
        try:
            return child.wait(LONGEST)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return 1000

    def judge(self, strike: Strike, number: signal.Signals, before: dict[str, Any], after: dict[str, Any], *,
              processes: bool) -> None:  # fmt: skip
        """Fill in what is wrong with the outcome of a strike."""
        wrong, said = strike.wrong, strike.said
        if processes and strike.status < 0 and not said and look(self.work) == before:
            return  # Python itself was starting
        if strike.status not in (0, 128 + number):
            wrong.append(f"ended with {strike.status}")
        for word in ("Traceback", "KeyboardInterrupt", "Exception ignored", "unexpected", "Error:"):
            if word in said:
                wrong.append(f"said {word!r}")
        lines = [line for line in said.splitlines() if line.strip() and not NOISE.match(line)]
        if strike.status == 128 + number and sum(bool(ENDED.match(line)) for line in lines) != 1:
            wrong.append(f"said {lines}")
        import loratool

        if "train" not in strike.case:  # a command that comes after, and enters what this one did not come to enter
            wrong += [f"doctor says {finding.message}" for finding in loratool.doctor(deep=True).findings]
        left = leftovers(self.work)
        if left:
            wrong.append(f"left {left[:5]}")
        found = look(self.work)
        for what in before:
            if found[what] not in (before[what], after[what]) and "train" not in strike.case:
                difference = found[what] if what == "catalogue" else differing(found[what], before[what])
                wrong.append(f"{what} between before and after: {difference}")
        if found["files"] == after["files"] != before["files"] and found["catalogue"] != after["catalogue"]:
            wrong.append("the output is there and the catalogue does not know of it")
        if (
            "train" not in strike.case
            and found["files"] != after["files"]
            and found["catalogue"] == after["catalogue"] != before["catalogue"]
        ):
            wrong.append("the catalogue knows of an output that is not there")
        for model in ("base", "merged", "restored"):
            try:
                loads_whole(self.work / model)
            except Exception as error:
                wrong.append(f"{model} cannot be loaded: {error}")
        if any(file.startswith("train") for file in (strike.case,)):
            self._judge_training(strike, after)

    def judge_again(self, strike: Strike, words: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Fill in what is wrong when the same command is run again: it comes to the bytes of one that nothing struck."""
        if "train" in strike.case:
            if catalogued(self.work)["adapters"]:
                return
            kept = (self.work / "home/runs/cat/state.safetensors").exists()
            words = "train --name cat --resume" if kept else TRAIN
        elif look(self.work) != before:
            return
        status = self.run(words)
        if status != 0:
            strike.wrong.append(f"the next run ends with {status}: {self.out.read_text()[-500:]}")
            return
        found = look(self.work)
        for state in (found, after):
            state["bytes"].pop("cat.train.jsonl", None)  # it says how long each step took
        strike.wrong += [
            f"{what} of the next run are others: {found[what] if what == 'catalogue' else differing(found[what], after[what])}"
            for what in (["bytes"] if "train" in strike.case else before)
            if found[what] != after[what]
        ]

    def _judge_training(self, strike: Strike, after: dict[str, Any]) -> None:
        """A run that ended says how to go on, if there is something to go on with, and so it does."""
        state = (self.work / "home/runs/cat/state.safetensors").exists()
        done = bool(catalogued(self.work)["adapters"])
        begun = strike.case == "train" or "nothing half done" not in strike.said
        if state and begun and "--resume" not in strike.said:
            strike.wrong.append("does not say how to go on")
        if strike.status == 0 and not done:
            strike.wrong.append("ended well without an adapter")
        if not state and not done and files_in(self.work) & {"cat.st", "cat.train.jsonl", "cat.train.png"}:
            strike.wrong.append("left an output")


def differing(one: Any, other: Any) -> list[Any]:
    """Up to six of the files that only one of two states has, or in which they differ."""
    one, other = (set(state.items()) if isinstance(state, dict) else state for state in (one, other))
    return sorted(one ^ other)[:6]


def _counting() -> Callable[[], int]:
    return call_at(1 << 60, lambda: None)


def _striking(number: signal.Signals, twice: bool) -> Callable[[], None]:
    def strike() -> None:
        os.kill(os.getpid(), number)
        if twice:
            call_at(400, lambda: os.kill(os.getpid(), number))

    return strike


def serve(folder: Path, names: Sequence[str], tries: int, seed: int, processes: bool) -> None:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its thread would stay, and only a process with one thread is forked
    server = Server(folder)
    for name in names:
        for strike in server.strikes(name, tries, seed, processes):
            print(json.dumps(asdict(strike)), flush=True)


def environment(folder: Path) -> dict[str, str]:
    """What the server runs under: a home of its own inside the folder that is copied, and no network."""
    root = Path(__file__).parents[1]
    return os.environ | {
        "PYTHONPATH": f"{root}:{root}/tests",
        "LORATOOL_HOME": str(folder / "work" / "home"),
        "HF_HOME": str(folder / "work" / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "COLUMNS": "160",
    }


def strike_all(
    folder: Path, names: Sequence[str], tries: int, seed: int, *, processes: bool = False
) -> Iterator[Strike]:
    """Build everything in `folder` and strike these commands; the Hub that they pull from is in this process."""
    from hub_adapters import publish
    from hub_stand_in import HubStandIn

    build(folder / "source")
    with HubStandIn() as hub:
        publish(hub, "ada/pirate", folder / "source" / "adapter", base_model="ada/base")
        words = [sys.executable, __file__, "--serve", str(folder), "--tries", str(tries), "--seed", str(seed)]
        if processes:
            words.append("--processes")
        online = hub.environment(folder / "work" / "hf") if ONLINE & set(names) else {}
        server = subprocess.Popen([*words, *names], env=environment(folder) | online, cwd=folder, text=True,
                                  stdout=subprocess.PIPE)  # fmt: skip
        assert server.stdout is not None
        made = 0
        for line in server.stdout:
            made += 1
            yield Strike(**json.loads(line))
        assert server.wait() == 0 and made == tries * len(names), f"only {made} tries were made"


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--serve", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.names, options.tries, options.seed, options.processes)
        return
    with tempfile.TemporaryDirectory() as folder:
        counts: dict[str, list[int]] = {}
        for strike in strike_all(Path(folder), options.names, options.tries, options.seed, processes=options.processes):
            count = counts.setdefault(strike.case, [0, 0, 0])
            count[0] += 1
            count[1] += strike.status != 0
            count[2] += bool(strike.wrong)
            if strike.wrong:
                print(json.dumps(asdict(strike), indent=1), flush=True)
        print(f"{'COMMAND':<20} TRIES ENDED WRONG")
        for name, (tried, stopped, wrong) in counts.items():
            print(f"{name:<20} {tried:5} {stopped:5} {wrong:5}")
        sys.exit(any(wrong for _, _, wrong in counts.values()))


if __name__ == "__main__":
    main()
