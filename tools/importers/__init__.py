"""Checkpoints of other frameworks: one module per source, each with a function ``read`` that gives a ``Conversion``."""
