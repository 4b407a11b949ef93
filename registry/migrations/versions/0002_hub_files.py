"""What the Hub says of files: those of a base that is not downloaded, and where in a repository an adapter lies."""

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
