"""The public functions: each resolves names in the catalogue, calls the rooms, and records what happened."""
