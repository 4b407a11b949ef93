"""Parts of `loratool.push`: the files of an adapter or a model as they are sent to the Hub."""
