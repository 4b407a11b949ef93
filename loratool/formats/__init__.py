"""Adapter files: read into an `Adapter`, and written from one. Reads headers and configurations only; imports no torch."""
