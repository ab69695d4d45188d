"""The metrics themselves, a function each: predictions in, scores out."""
