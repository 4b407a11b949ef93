"""Model architectures as data: roles, orientation and ties of parameters, and their names on disk and in memory.

The facts are in the tables of the folder ``families``, one file per family; a new family is one new file. ``generic.json``
covers models that no other table knows. Nothing here needs torch or transformers.
"""

from loratool.architecture.architecture import Architecture, Place, Shaped, any_model, architecture_of, module_of
from loratool.architecture.orientation import Orientation
from loratool.architecture.packing import Matrix
from loratool.architecture.quantizable import quantizable_weights, skipped_modules
from loratool.architecture.renaming import Spelling
from loratool.architecture.roles import Role
from loratool.architecture.same_part import same_part
from loratool.architecture.view import ALL, WHOLE, View

__all__ = [
    "ALL",
    "WHOLE",
    "Architecture",
    "Matrix",
    "Orientation",
    "Place",
    "Role",
    "Shaped",
    "Spelling",
    "View",
    "any_model",
    "architecture_of",
    "module_of",
    "quantizable_weights",
    "same_part",
    "skipped_modules",
]
