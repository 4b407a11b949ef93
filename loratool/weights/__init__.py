"""Storages: how one parameter is stored, and how its blocks become fp32 and go back.

A storage comes in two forms, as an update does (`loratool.updates`). The form that a plan holds is made from headers: `claim`
looks at the tensors of a model by name (no torch, no numbers) and returns a `StoredWeight` for a parameter that it knows how to
read, which says which bytes hold a block of rows. Its `load` reads what else is needed (scales) and gives the form that decodes
and encodes those bytes. A storage knows nothing of adapters. A new one is one new module here and one row in
`loratool.weights.storages`.
"""
