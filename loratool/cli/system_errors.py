"""What to say of an error of the operating system that no command foresaw: what failed, and what to do."""

from __future__ import annotations

import errno
from typing import Final

from loratool.errors import quoted

ADVICE: Final = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "your quota is used up; free some space, or choose another disk",
    errno.EFBIG: "the file system, or a limit of your shell (ulimit -f), takes no larger file; choose another disk",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "get the right to use it, or choose another place",
    errno.EPERM: "get the right to use it, or choose another place",
    errno.EMFILE: "allow more open files with 'ulimit -n 4096', and run again",
    errno.ENFILE: "close other programs, and run again",
    errno.ENOMEM: "close other programs, and run again",
    errno.EAGAIN: "wait until other programs have ended, and run again",
    errno.EIO: "its disk may be failing; look at 'dmesg', and save what you can",
    errno.ESTALE: "the network disk was reconnected meanwhile; run again",
    errno.ENOTCONN: "the network disk is not connected; connect it, and run again",
    errno.EHOSTDOWN: "the network disk is not connected; connect it, and run again",
    errno.ETIMEDOUT: "the network disk or connection does not answer; run again when it does",
    errno.ENOENT: "check that it is there",
    errno.ENOTDIR: "check its path, of which a part is a file and not a folder",
    errno.EISDIR: "give a file instead of a folder",
    errno.ELOOP: "its links lead in a circle; replace them by the file itself",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ETXTBSY: "end the program that uses it, and run again",
    errno.EBUSY: "end the program that uses it, and run again",
    errno.EXDEV: "choose a place on the same disk",
}
"""By error number, what a user can do."""

ELSE: Final = "check that it is there, that you may read and write it, and that the disk is not full"


def explain_system_error(error: OSError) -> str:
    """Return one sentence: what could not be used, why in the system's words, and what to do."""
    names = [quoted(name) for name in (error.filename, error.filename2) if name is not None]
    what = " and ".join(names) or "a file or device"
    advice = ADVICE.get(error.errno or 0, ELSE)
    return f"{what} cannot be used ({error.strerror or error}); {advice}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as Python, or torch on a CPU or a GPU, says it."""
    named = type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


OUT_OF_MEMORY: Final = (
    "there is not enough memory for this; close other programs, or ask for less at once (--batch-size, --device cpu), and run "
    "again"
)
