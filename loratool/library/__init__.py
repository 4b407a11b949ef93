"""The public functions. Each resolves names in the catalogue, calls the packages below, and records what happened."""
