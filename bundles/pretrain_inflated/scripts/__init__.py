"""Copied from tools/bundle_code by `python -m tools vendor`: change it there."""
