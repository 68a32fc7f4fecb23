"""One file per method family: the ``scale_by_*`` transformations."""
