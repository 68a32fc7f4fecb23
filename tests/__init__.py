"""A package, so that a `tests` in site-packages does not hide it from child processes."""
