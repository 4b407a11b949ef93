"""Parts of `loratool.merge`, `unmerge` and `verify`: options, result, record, tokenizer, calibration, sources."""
