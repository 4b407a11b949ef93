"""What a command shows while it works and beside its result: progress and pictures."""
