"""Errors of the catalogue. Each message is one sentence that says what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class RegistryError(Exception):
    """The catalogue or its content store cannot do the operation."""


class InvalidNameError(RegistryError):
    """A name, tag or version that the catalogue does not accept."""


class AlreadyExistsError(RegistryError):
    """The name is taken by something else."""


class InUseError(RegistryError):
    """Something in the catalogue still depends on the entry to remove."""


class NotSureError(RegistryError):
    """The operation would destroy data that may still be wanted, and needs a confirmation."""


class NotFoundError(RegistryError):
    """No such entry. `nearest` holds the names most similar to the given one, best first."""

    def __init__(self, message: str, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nearest = tuple(nearest)


class RegistryBusyError(RegistryError):
    """Another process held the database for longer than the busy timeout."""


class RegistryUnwritableError(RegistryError):
    """The catalogue cannot be written now. Commands that only record something in it proceed without."""


class RegistryReadOnlyError(RegistryUnwritableError):
    """The database, the store or their folder cannot be written."""


class RegistryFullError(RegistryUnwritableError):
    """The disk of the database or of the store is full."""


class RegistryDamagedError(RegistryError):
    """The file is not a database, or parts of it cannot be read."""


class DamagedValueError(RegistryDamagedError):
    """A row holds a value that cannot be read. `reason` says which: "it holds '[[[' where JSON belongs"."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the registry is damaged: a row of it cannot be read ({reason}); 'loratool doctor' names that row and its way out"
        )
        self.reason = reason


class SchemaTooNewError(RegistryError):
    """The database was written by a newer version of this software."""
