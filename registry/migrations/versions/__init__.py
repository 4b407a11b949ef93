"""One file a revision, numbered from 0001."""
