"""Training of adapters: their layers and methods, batches, the loop and the recipe."""
