"""The merge methods: one function is one method, its keyword parameters are the recipe's schema."""

from tools.merge_methods import average, task_arithmetic, ties  # noqa: F401 - they register themselves
from tools.merge_methods.registry import METHODS, MergeMethod

__all__ = ["METHODS", "MergeMethod"]
