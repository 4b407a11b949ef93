"""Adapters into adapters of other ranks: on their factors, one module at a time, never on the dense update."""
