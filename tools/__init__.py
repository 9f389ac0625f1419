"""Command-line tools for merging 3D medical segmentation models: ``python -m tools <command> --help``."""

__version__ = "0.1.0"
