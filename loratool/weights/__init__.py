"""Storages: how one parameter is stored, and how its blocks are decoded to fp32 and encoded again.

Like an update (`loratool.updates`), a storage has two forms. The first is made from headers alone, without torch, and goes into
a plan: `claim` looks up the tensors of a model by name and returns a `StoredWeight`, which knows the bytes of each block of
rows. Its `load` reads what else is needed, such as scales, and returns the second form, which decodes and encodes these bytes.

A storage knows nothing about adapters. A new one is one new module here and one row in `loratool.weights.storages`.
"""
