"""Ctrl-C, SIGTERM and SIGHUP end every command in one way: one line, an exit status, and nothing half done.

`interrupting` sends the signals; as a program it does so at length.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupting import CASES, Strike, strike_all

from loratool import interrupts
from loratool.checkpoint.threads import in_threads
from loratool.interrupts import Deferral, Interrupted
from registry import Registry

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")
QUICK = [name for name in CASES if not name.startswith("train")]


def expect_clean(strikes: Iterator[Strike]) -> None:
    found = list(strikes)
    wrong = [strike for strike in found if strike.wrong]
    assert not wrong, wrong[0]
    assert sum(strike.status != 0 for strike in found) > len(found) / 2, "hardly a strike met a command"


@pytest.mark.parametrize("half", [0, 1])
def test_every_command_that_writes_ends_cleanly_at_any_moment(half: int, tmp_path: Path) -> None:
    expect_clean(strike_all(tmp_path, QUICK[half::2], tries=4, seed=half))


def test_a_training_that_is_interrupted_at_any_moment_keeps_its_state_or_leaves_nothing(tmp_path: Path) -> None:
    expect_clean(strike_all(tmp_path, ["train", "train resume"], tries=4, seed=1))


# The mechanism, in a process of its own, since it changes what signals do.


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, sys, time\nfrom loratool import interrupts\ninterrupts.install()\n"
    strike = "def strike(number=signal.SIGINT):\n    os.kill(os.getpid(), number)\n"
    tail = "except KeyboardInterrupt as error:\n    interrupts.finish()\n    print('ended by', error.number.name)\n"
    body = "".join(f"    {line}\n" for line in program.strip().splitlines())
    return subprocess.run(
        [sys.executable, "-c", f"{head}{strike}try:\n{body}{tail}"],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_an_interrupt_that_a_destructor_or_a_library_swallows_is_raised_again() -> None:
    swallowers = {
        "a destructor": "class Dies:\n    def __del__(self):\n        strike()\ndies = Dies()\ndel dies",
        "a callback": "import weakref\nclass Dies: pass\ndies = Dies()\n"
        "kept = weakref.ref(dies, lambda _: strike())\ndel dies",
        "whoever catches everything": "try:\n    strike()\n    time.sleep(9)\nexcept BaseException:\n    pass",
        "a sort": "try:\n    sorted([1, 2], key=lambda _: strike())\nexcept BaseException:\n    pass",
    }
    for what, program in swallowers.items():
        done = run_program(f"{program}\nfor _ in range(900):\n    time.sleep(0.01)\nprint('went on')")
        assert (done.stdout, done.stderr) == ("ended by SIGINT\n", ""), what


def test_an_interrupt_waits_for_what_must_not_be_torn() -> None:
    program = """
from loratool.interrupts import whole
from contextlib import contextmanager
@whole
def makes():
    strike(signal.SIGTERM)
    inner()
    print('made')
def inner():
    pass
class Taken:
    def __enter__(self):
        os.kill(os.getpid(), signal.SIGINT)
        print('taken')
    def __exit__(self, *error):
        print('given back')
if len(sys.argv) == 1:
    with Taken():
        time.sleep(9)
"""
    done = run_program(program)
    assert done.stdout.splitlines() == ["taken", "given back", "ended by SIGINT"], done
    done = run_program(program.replace("len(sys.argv) == 1", "False") + "makes()\ntime.sleep(9)")
    assert done.stdout.splitlines() == ["made", "ended by SIGTERM"], done


def test_an_interrupt_that_waits_is_raised_at_the_end_of_a_deferral_that_has_begun_meanwhile() -> None:
    program = """
class Begins:
    def __enter__(self):
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.Deferral.__enter__(deferral)
    def __exit__(self, *error):
        deferral.__exit__(*error)
deferral = interrupts.Deferral()
with Begins():
    until = time.monotonic() + 10 * interrupts.LONGEST_SECONDS_BETWEEN_LOOKS
    while time.monotonic() < until:
        pass
    print('whole')
"""
    done = run_program(program)
    assert done.stdout.splitlines() == ["whole", "ended by SIGINT"], done


def test_what_is_copied_into_the_store_is_gone_after_an_interrupt_at_any_call(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from interrupting import _striking, call_at, ended, see_through_strikes
import loratool.library.recording.opening
from registry.store import Store
store = Store(Path({str(tmp_path)!r}))
store.put({{"warm": b"up"}})
see_through_strikes()
def stage(moment):
    counted = call_at(moment, _striking(signal.SIGINT, False))
    with store.stage({{"adapter_model.safetensors": b"weights", "adapter_config.json": b"{{}}"}}):
        pass
    sys.setprofile(None)
    return counted()
calls = stage(1 << 60)
assert calls > 50, calls
for moment in range(1, calls + 1):
    child = os.fork()
    if not child:
        try:
            stage(moment)
            time.sleep(9)
        except KeyboardInterrupt:
            sys.setprofile(None)
        finally:
            os._exit(bool(list(store.folder("tmp").iterdir())))
    assert ended(child) == 0, f"something is left after an interrupt at call {{moment}} of {{calls}}"
print("nothing is left")
"""
    done = run_program(program)
    assert done.stdout == "nothing is left\n", done.stderr


def test_an_interrupt_is_not_raised_again_while_it_is_on_its_way_out() -> None:
    program = """
try:
    strike()
    time.sleep(9)
finally:
    strike(signal.SIGTERM)
    until = time.monotonic() + 3 * interrupts.SECONDS_TO_UNWIND
    while time.monotonic() < until:
        pass
    print('cleaned up')
"""
    done = run_program(program)
    assert done.stdout.splitlines() == ["cleaned up", "ended by SIGINT"], done


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_each_signal_has_its_exit_status_and_one_line(number: str, status: int) -> None:
    program = f"""
import signal, os
from loratool import __main__
import loratool.library.list as listing
listing.list_adapters = lambda **options: os.kill(os.getpid(), signal.{number}) or [None for _ in iter(int, 1)]
import sys
sys.argv = ["loratool", "list"]
__main__.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    by = "" if number == "SIGINT" else f" by {number}"
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"Interrupted{by}: nothing half done is left.\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    program = """
import signal
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # as nohup does, and a shell for what runs in its background
from loratool import interrupts
interrupts.install()
print(*(signal.getsignal(number) is signal.SIG_IGN for number in interrupts.ENDING))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert done.stdout == "True False True\n", done


def test_a_terminal_that_is_gone_is_not_written_to() -> None:
    """Closing a terminal sends SIGHUP; from then on what is printed to it would be an error."""
    import pty

    program = (
        "import os, signal, sys, time\nfrom loratool import interrupts\ninterrupts.install()\n"
        "with interrupts.Deferral(patient=True, raises=False) as deferral:\n"
        "    os.write(int(sys.argv[1]), b'ready')\n"
        "    while deferral.number is None:\n        time.sleep(0.01)\n"
        "print('still here')\nsys.stdout.flush()\nos.write(int(sys.argv[1]), b' done')\n"
    )
    reading, writing = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(Path(__file__).parents[1])
        os.set_inheritable(writing, True)
        os.execv(sys.executable, [sys.executable, "-c", program, str(writing)])
    os.close(writing)
    assert os.read(reading, 100) == b"ready"
    os.close(terminal)
    assert os.read(reading, 100) == b" done"
    assert os.waitpid(pid, 0)[1] == 0


def test_threads_stop_at_an_interrupt_and_it_is_raised_at_the_end() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 60
        while number < 2:
            interrupts.check()
            assert time.monotonic() < deadline, "nobody said that the work is to stop"
        done.append(number)

    with pytest.raises(Interrupted):
        in_threads(work, range(100), 2)
    assert done == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_threads_that_hang_are_left_at_an_interrupt() -> None:
    hanging = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        hanging.wait(60)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        in_threads(work, range(2), 2, leave=True)
    hanging.set()
    assert time.monotonic() - began < 30


def test_a_patient_deferral_is_left_by_the_second_interrupt() -> None:
    noticed: list[str] = []
    with Deferral(lambda: noticed.append("first"), patient=True, raises=False) as deferral:
        os.kill(os.getpid(), signal.SIGINT)
        assert deferral.number == signal.SIGINT
    with pytest.raises(Interrupted), Deferral(lambda: noticed.append("again"), patient=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        noticed.append("not reached")
    assert noticed == ["first", "again"]


def test_a_deferral_inside_another_hands_the_interrupt_on() -> None:
    reached: list[str] = []
    with pytest.raises(Interrupted):
        with Deferral(patient=True):
            with Deferral():
                os.kill(os.getpid(), signal.SIGINT)
                reached.append("inner")
            reached.append("outer")
        reached.append("after")
    assert reached == ["inner", "outer"]


def test_an_error_in_a_deferral_is_not_hidden_by_an_interrupt() -> None:
    with pytest.raises(ZeroDivisionError), Deferral():
        os.kill(os.getpid(), signal.SIGINT)
        _ = 1 / 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_waits_for_another_writer_ends_at_once(number: int, status: int, tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        registry.bases.add("llama", "meta/llama")
    with Registry.open(tmp_path) as registry, registry.writing():
        waiting = subprocess.Popen(
            [sys.executable, "-m", "loratool", "base", "remove", "llama"],
            env={**os.environ, "LORATOOL_HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        said = waiting.stderr.readline()
        waiting.send_signal(number)
        try:
            _, error = waiting.communicate(timeout=20)  # it would wait a minute
        finally:
            waiting.kill()
    assert "waiting for process" in said
    assert waiting.returncode == status, error
    assert error.startswith("Interrupted") and len(error.splitlines()) == 1
