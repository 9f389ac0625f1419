"""``make bench``: speed, as ratios within one run.

Without a word all of it, or what is named: training, inference, cohort, merging, methods, corruptions.

``ARGS="large <folder>"`` measures the memory of a merge of 1.48 billion parameters, for which the folder must have 60 GB.
"""

import sys

if __name__ == "__main__":
    wanted = sys.argv[1:] or ["training", "inference", "cohort", "merging", "methods", "corruptions"]
    if "training" in wanted:
        import torch

        from tests.benchmarks.training_step import compare_training_steps

        print(f"{torch.get_num_threads()} threads; ours, MONAI's default (float32, contiguous), ratio of the two\n")
        compare_training_steps()
    if "inference" in wanted:
        from tests.benchmarks.inference import compare_inference

        compare_inference()
    if "cohort" in wanted:
        from tests.benchmarks.cohort import compare_cohorts

        compare_cohorts()
    if "merging" in wanted:
        from tests.benchmarks.merging import compare_merging

        compare_merging()
    if "methods" in wanted:
        from tests.benchmarks.merging import measure_methods

        measure_methods()
    if "corruptions" in wanted:
        from tests.benchmarks.corruptions import compare_shuffles

        compare_shuffles()
    if wanted[0] == "large":
        from tests.benchmarks.merging import measure_large_merge

        measure_large_merge(wanted[1])
