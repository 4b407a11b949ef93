"""The places of the catalogue: its home folder and its database's URL."""

from __future__ import annotations

import os
from pathlib import Path

from registry.errors import RegistryError
from registry.names import printable

DATABASE_NAME = "registry.db"
STORE_NAME = "store"


def is_gone(path: Path) -> bool:
    """Whether nothing exists at `path`. False if that is unknown, because the disk fails or a folder cannot be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def home() -> Path:
    """Return the absolute path of the home folder, which may not exist yet.

    It is `LORATOOL_HOME`, or by default the platform's user data folder.

    Raises RegistryError if the path needs a user's home or a working folder that does not exist.
    """
    named = os.environ.get("LORATOOL_HOME")
    if named:
        return _absolute(named)
    import platformdirs

    try:
        found = platformdirs.user_data_path("loratool", appauthor=False)
    except RuntimeError:
        found = Path("~")
    if not found.is_absolute():
        raise RegistryError(
            "there is no home folder for the catalogue: HOME is not set, and this user has no home folder; "
            "set LORATOOL_HOME to a folder"
        )
    return found


def _absolute(named: str) -> Path:
    """Return the absolute path of the folder in LORATOOL_HOME."""
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        raise RegistryError(
            f"LORATOOL_HOME is '{printable(named)}', and there is no such home folder; set it to another folder"
        ) from None
    except FileNotFoundError:
        raise RegistryError(
            f"LORATOOL_HOME is '{printable(named)}', relative to a working folder that was deleted; "
            "change to another folder, or set it to a path that begins with '/'"
        ) from None


def registry_url() -> str | None:
    """Return the SQLAlchemy URL in `LORATOOL_REGISTRY`, or None for the file `registry.db` in the home folder."""
    return os.environ.get("LORATOOL_REGISTRY") or None
