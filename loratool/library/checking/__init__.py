"""Checks before a command writes: the right base, not merged already, a change at all, nothing left beside."""
