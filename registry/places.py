"""Where the catalogue lives: the home folder and the database's URL."""

from __future__ import annotations

import os
from pathlib import Path

DATABASE_NAME = "registry.db"
STORE_NAME = "store"


def is_gone(path: Path) -> bool:
    """Whether nothing is at `path`. Where that cannot be told, on a disk that fails or in a folder that is closed, it is not."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def home() -> Path:
    """The home folder: `LORATOOL_HOME`, else the platform's user data folder. Absolute; it may not exist yet."""
    named = os.environ.get("LORATOOL_HOME")
    if named:
        return Path(named).expanduser().absolute()
    import platformdirs

    return platformdirs.user_data_path("loratool", appauthor=False)


def registry_url() -> str | None:
    """The SQLAlchemy URL in `LORATOOL_REGISTRY`, or None: then it is the file `registry.db` in the home folder."""
    return os.environ.get("LORATOOL_REGISTRY") or None
