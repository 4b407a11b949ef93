"""Where things lie on disk: the user's paths, outputs, the home folder, unfinished runs, and locks of folders."""
