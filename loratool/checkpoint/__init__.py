"""Models on disk: headers, shards, streaming, copying, safe output and fingerprints. Imports no torch."""
