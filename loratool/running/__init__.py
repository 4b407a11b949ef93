"""A model run on a user's own text: loading, samples as tokens, loss, and the inputs of its modules."""
