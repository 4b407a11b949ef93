"""Adds the Hub's list of a base's files, and the path of an adapter inside its repository."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("bases", sa.Column("files", sa.JSON()))
    op.add_column("locations", sa.Column("path_in_repo", sa.Text()))


def downgrade() -> None:
    with op.batch_alter_table("locations") as table:
        table.drop_column("path_in_repo")
    with op.batch_alter_table("bases") as table:
        table.drop_column("files")
