"""``make bench``: speed, as ratios within one run. Without a word all of it, or what is named: training, merging."""

import sys

if __name__ == "__main__":
    wanted = sys.argv[1:] or ["training", "merging"]
    if "training" in wanted:
        import torch

        from tests.benchmarks.training_step import compare_training_steps

        print(f"{torch.get_num_threads()} threads; ours, MONAI's default (float32, contiguous), ratio of the two\n")
        compare_training_steps()
    if "merging" in wanted:
        from tests.benchmarks.merging import compare_merging

        compare_merging()
