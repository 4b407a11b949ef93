"""Models at work on a user's own text: data, loading, loss."""
