"""One file per revision, numbered from 0001."""
