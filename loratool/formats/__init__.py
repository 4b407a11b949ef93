"""Adapter files: read into an `Adapter` and written from one. Reading needs only headers and configurations, and no torch."""
