"""What the catalogue raises: each error is one sentence that says what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class RegistryError(Exception):
    """The catalogue or its content store cannot do what was asked."""


class InvalidNameError(RegistryError):
    """A name, tag or version that the catalogue does not accept."""


class AlreadyExistsError(RegistryError):
    """The name is taken by something else."""


class InUseError(RegistryError):
    """Something in the catalogue still depends on what should be removed."""


class NotSureError(RegistryError):
    """What was asked for would destroy what may be wanted; it is done only where that is said to be meant."""


class NotFoundError(RegistryError):
    """No such entry. `nearest` holds the names most like the one asked for, best first."""

    def __init__(self, message: str, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nearest = tuple(nearest)


class RegistryBusyError(RegistryError):
    """Another process held the database for longer than the busy timeout."""


class RegistryUnwritableError(RegistryError):
    """Nothing can be written to the catalogue now; what only needs to be noted there is done without it."""


class RegistryReadOnlyError(RegistryUnwritableError):
    """The database, the store or their folder cannot be written."""


class RegistryFullError(RegistryUnwritableError):
    """The disk of the database or of the store is full."""


class RegistryDamagedError(RegistryError):
    """The database is no database, or parts of it cannot be read."""


class SchemaTooNewError(RegistryError):
    """The database was written by a newer version of this software."""
