"""Merging: plan, then apply; undo, unmerge and verify. A plan is made from headers alone and is all that apply needs."""
