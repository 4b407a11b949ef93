"""Parts of `loratool.train`: inputs, observers, outputs, picture and progress of a run."""
