"""The merge methods: one function is one method, its keyword parameters are the recipe's schema."""

from tools.merge_methods.average import average
from tools.merge_methods.registry import METHODS, MergeMethod
from tools.merge_methods.task_arithmetic import task_arithmetic
from tools.merge_methods.ties import ties

__all__ = ["METHODS", "MergeMethod", "average", "task_arithmetic", "ties"]
