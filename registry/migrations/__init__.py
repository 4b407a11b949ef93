"""Alembic's revisions of the catalogue's schema."""
