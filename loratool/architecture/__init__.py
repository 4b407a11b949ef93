"""What a model is, as data: roles, orientation and ties of its parameters, and their names on disk and in memory.

The facts stand in the tables of the folder ``families``, one file a family; a new family is one new file. What no table
knows goes by ``generic.json``. Nothing here needs torch or transformers.
"""

from loratool.architecture.architecture import Architecture, Place, Shaped, architecture_of, module_of
from loratool.architecture.packing import Matrix
from loratool.architecture.renaming import Spelling
from loratool.architecture.roles import Role
from loratool.architecture.view import View

__all__ = ["Architecture", "Matrix", "Place", "Role", "Shaped", "Spelling", "View", "architecture_of", "module_of"]
