"""Merge methods, sparsifiers and post-processors: one function is one of them, its keyword parameters the recipe's schema."""

# they register themselves, in the order in which they are listed
from tools.merge_methods import average, task_arithmetic, ties  # isort: skip # noqa: F401
from tools.merge_methods import sphere, model_stock, consensus, emr, spectral  # isort: skip # noqa: F401
from tools.merge_methods import fisher, regmean  # isort: skip # noqa: F401
from tools.merge_methods import postprocessors, sparsifiers  # noqa: F401
from tools.merge_methods.registry import METHODS, POSTPROCESSORS, SPARSIFIERS, Method

__all__ = ["METHODS", "POSTPROCESSORS", "SPARSIFIERS", "Method"]
