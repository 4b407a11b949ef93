"""Creates the catalogue: bases, adapters, tags, locations, lineage, merges and the adapters of each merge."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_bases()
    create_adapters()
    create_tags()
    create_locations()
    create_lineage()
    create_merges()
    create_merged_adapters()


def create_bases() -> None:
    op.create_table(
        "bases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("revision", sa.String(255)),
        sa.Column("path", sa.Text()),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("variant_of", sa.Integer()),
        sa.Column("architecture", sa.String(255)),
        sa.Column("model_type", sa.String(255)),
        sa.Column("parameter_count", sa.BigInteger()),
        sa.Column("size_bytes", sa.BigInteger()),
        sa.Column("dtype", sa.String(32)),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bases"),
        sa.UniqueConstraint("name", name="uq_bases_name"),
        sa.ForeignKeyConstraint(["variant_of"], ["bases.id"], name="fk_bases_variant_of_bases", ondelete="SET NULL"),
    )
    op.create_index("ix_bases_fingerprint", "bases", ["fingerprint"])
    op.create_index("ix_bases_variant_of", "bases", ["variant_of"])


def create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("rank", sa.Integer()),
        sa.Column("ranks", sa.JSON()),
        sa.Column("alpha", sa.Double()),
        sa.Column("scaling", sa.JSON()),
        sa.Column("target_modules", sa.JSON()),
        sa.Column("dtype", sa.String(32)),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("parameter_count", sa.BigInteger()),
        sa.Column("base_id", sa.Integer()),
        sa.Column("base_fingerprint", sa.String(64)),
        sa.Column("base_model", sa.Text()),
        sa.Column("recipe", sa.JSON()),
        sa.Column("metrics", sa.JSON()),
        sa.Column("config", sa.JSON()),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("name", "version", name="uq_adapters_name"),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name="fk_adapters_base_id_bases", ondelete="SET NULL"),
    )
    for column in ("kind", "sha256", "base_id", "base_fingerprint", "created_at"):
        op.create_index(f"ix_adapters_{column}", "adapters", [column])


def create_tags() -> None:
    op.create_table(
        "tags",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(96), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "tag", name="pk_tags"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_tags_adapter_id_adapters", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_tags_tag", "tags", ["tag"])


def create_locations() -> None:
    op.create_table(
        "locations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("store_key", sa.String(64)),
        sa.Column("path", sa.Text()),
        sa.Column("repo", sa.String(255)),
        sa.Column("revision", sa.String(255)),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_locations"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_locations_adapter_id_adapters", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_locations_adapter_id", "locations", ["adapter_id"])
    op.create_index("ix_locations_store_key", "locations", ["store_key"])


def create_lineage() -> None:
    op.create_table(
        "lineage",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer()),
        sa.Column("parent", sa.Text(), nullable=False),
        sa.Column("parent_sha256", sa.String(64)),
        sa.Column("operation", sa.String(32), nullable=False),
        sa.Column("details", sa.JSON()),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lineage"),
        sa.ForeignKeyConstraint(["child_id"], ["adapters.id"], name="fk_lineage_child_id_adapters", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["adapters.id"], name="fk_lineage_parent_id_adapters", ondelete="SET NULL"
        ),
    )
    op.create_index("ix_lineage_child_id", "lineage", ["child_id"])
    op.create_index("ix_lineage_parent_id", "lineage", ["parent_id"])


def create_merges() -> None:
    op.create_table(
        "merges",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer()),
        sa.Column("base_fingerprint", sa.String(64), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("output_fingerprint", sa.String(64)),
        sa.Column("undo_file", sa.Text()),
        sa.Column("in_place", sa.Boolean(), nullable=False),
        sa.Column("options", sa.JSON()),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_merges"),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name="fk_merges_base_id_bases", ondelete="SET NULL"),
    )
    for column in ("base_id", "base_fingerprint", "output_fingerprint"):
        op.create_index(f"ix_merges_{column}", "merges", [column])


def create_merged_adapters() -> None:
    op.create_table(
        "merged_adapters",
        sa.Column("merge_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("adapter_id", sa.Integer()),
        sa.Column("adapter", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("merge_id", "position", name="pk_merged_adapters"),
        sa.ForeignKeyConstraint(
            ["merge_id"], ["merges.id"], name="fk_merged_adapters_merge_id_merges", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapters.id"],
            name="fk_merged_adapters_adapter_id_adapters",
            ondelete="SET NULL",
        ),
    )
    op.create_index("ix_merged_adapters_adapter_id", "merged_adapters", ["adapter_id"])
    op.create_index("ix_merged_adapters_sha256", "merged_adapters", ["sha256"])


def downgrade() -> None:
    for table in ("merged_adapters", "merges", "lineage", "locations", "tags", "adapters", "bases"):
        op.drop_table(table)
