"""Adapters made from adapters or models. All work is on factors, one module at a time; no dense update is formed."""
