"""``make bench``: speed, as ratios within one run. A line: what, seconds of ours, seconds of the other way, their ratio."""

import torch

from tests.benchmarks.training_step import compare_training_steps

if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads; ours, MONAI's default (float32, contiguous), ratio of the two\n")
    compare_training_steps()
