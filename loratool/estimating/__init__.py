"""Parameters of a model, and the memory that training it takes, from its configuration alone. Needs no torch."""
