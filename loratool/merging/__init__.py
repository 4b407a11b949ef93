"""Merging: plan, then apply; undo, unmerge and verify. Plans are made from headers alone and contain all that apply needs."""
