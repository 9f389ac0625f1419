"""Training as users run it: reproducible, resumable after a kill, on one process or two, and evaluated by overlay."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import QUICK, ROOT, run, train
from tools.bundle import Bundle


@pytest.fixture
def fresh(chain, tmp_path):
    """A copy of the specialist bundle before training."""

    def copy(name):
        folder = tmp_path / name
        shutil.copytree(chain.specialists["liver"], folder)
        shutil.rmtree(folder / "checkpoints")
        (folder / "models" / "model.pt").unlink()
        return folder

    return copy


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


EXTRA = ("--max_epochs", 4, "--frozen_epochs", 1, "--patches_per_volume", 6, "--norm_budget", 0.005)


def test_training_keeps_the_best_model_as_plain_tensors(chain):
    for folder in (chain.pretrain, *chain.specialists.values()):
        state = torch.load(folder / "models" / "model.pt", weights_only=True)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert torch.count_nonzero(state["head.weight"][0]) == 0
        assert list((folder / "checkpoints").glob("events.out.tfevents*"))
        assert sorted(p.name for p in (folder / "models").glob("*.pt")) == ["model.pt"]


def test_fine_tuning_starts_from_the_starting_point_and_freezes_it_first(chain, fresh):
    folder = fresh("frozen")
    result = train(folder, "--max_epochs", 1, "--frozen_epochs", 1, "--patches_per_volume", 2)
    assert "the backbone is frozen in all 1 epochs" in result.stdout + result.stderr
    before, after = Bundle(chain.pretrain).state(), checkpoint(folder)["network"]
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("head."))
    assert after["head.weight"].shape[0] == 2
    assert (folder / "models" / "model.pt").is_file()  # nothing better to come: the last epoch is kept
    first, second = checkpoint(chain.specialists["liver"])["optimizer"]["param_groups"]
    assert second["initial_lr"] == pytest.approx(10 * first["initial_lr"])


def test_a_batch_of_more_than_there_is_is_all_there_is(fresh):
    folder = fresh("few")
    train(folder, "--max_epochs", 1, "--frozen_epochs", 0, "--patches_per_volume", 1, "--batch_size", 64)
    assert checkpoint(folder)["epoch"] == 1 and (folder / "models" / "model.pt").is_file()


def test_a_killed_run_resumes_and_ends_as_an_unbroken_one(chain, fresh):
    unbroken, broken = fresh("unbroken"), fresh("broken")
    train(unbroken, *EXTRA)
    words = ["--config_file", broken / "configs/train.json", "--bundle_root", broken, *EXTRA]
    process = subprocess.Popen(
        [sys.executable, "-m", "monai.bundle", "run", *map(str, words)],
        cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 300
    while not (broken / "checkpoints" / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    epoch = checkpoint(broken)["epoch"]
    assert epoch < 4
    result = train(broken, *EXTRA)
    assert f"resumed after epoch {epoch}" in result.stdout + result.stderr
    a, b = checkpoint(unbroken), checkpoint(broken)
    assert (a["epoch"], a["best_epoch"]) == (b["epoch"], b["best_epoch"]) == (4, a["best_epoch"])
    assert a["best_epoch"] > 1  # never the frozen epoch, whose task vector would be zero
    assert a["best"] == pytest.approx(b["best"], abs=1e-6)
    for name in a["network"]:
        torch.testing.assert_close(a["network"][name], b["network"][name], rtol=1e-5, atol=1e-6)
    start = {name: tensor for name, tensor in Bundle(chain.pretrain).state().items() if not name.startswith("head.")}
    moved = torch.cat([(a["network"][name] - tensor).flatten() for name, tensor in start.items()]).norm()
    assert 0 < moved <= 0.00501 * torch.cat([tensor.flatten() for tensor in start.values()]).norm()
    again = train(broken, *EXTRA)  # finished: nothing left to do
    assert "resumed after epoch 4" in again.stdout + again.stderr


def test_a_broken_checkpoint_is_refused_with_a_way_out(fresh):
    folder = fresh("damaged")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.pt").write_bytes(b"PK\x03\x04 cut off")
    result = train(folder, *EXTRA, check=False)
    assert result.returncode != 0
    assert "cannot resume from" in result.stderr + result.stdout
    assert "--resume False" in result.stderr + result.stdout


def test_evaluate_overlay_writes_dice_per_case(chain):
    folder = chain.specialists["liver"]
    config = f"['{folder}/configs/train.json','{folder}/configs/evaluate.json']"
    train(folder, config=config)
    rows = list(csv.reader((folder / "eval" / "val_mean_dice_raw.csv").open()))
    assert len(rows) == 2  # header and the one validation case
    assert 0 <= float(rows[1][-1]) <= 1


def test_pretraining_with_each_of_the_papers_recipes_runs(chain, tmp_path):
    """And with sharpness-aware steps and averaged weights, which compose with them."""
    for recipe, dropout in (("stable,sam,swa", 0.5), ("sharp,asam,ema", 0.0)):
        folder = tmp_path / recipe.replace(",", "_")
        words = ["--bundle", ROOT / "bundles/pretrain_amos", "--dataset_dir", chain.dataset, "--output", folder]
        run("tools", "new_pretraining", *words, "--overlay", f"small,{recipe}")
        extra = {**QUICK, "max_epochs": 1, "patches_per_volume": 2, "batch_size": 2}
        train(folder, *[word for key, value in extra.items() for word in (f"--{key}", value)])
        assert (folder / "models" / "model.pt").is_file()
        average = checkpoint(folder)["average"]
        model = torch.load(folder / "models" / "model.pt", weights_only=True)
        assert all(torch.equal(tensor, average[f"module.{name}"]) for name, tensor in model.items())
        assert f'"dropout": {dropout}' in (folder / "configs/train.json").read_text()


@pytest.mark.slow
def test_two_processes_reach_the_single_process_result(chain, fresh):
    single, double = fresh("single"), fresh("double")
    extra = [str(word) for word in ("--max_epochs", 6, "--frozen_epochs", 2, "--patches_per_volume", 16)]
    train(single, *extra)
    configs = f"['{double}/configs/train.json','{double}/configs/multi_gpu_train.json']"
    words = ["--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = ["-m", "monai.bundle", "run", "--config_file", configs, "--bundle_root", str(double), *extra]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *command],
        cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    one, two = checkpoint(single), checkpoint(double)
    assert two["epoch"] == 6
    assert one["best"] > 0.5  # the liver is found at all
    assert abs(one["best"] - two["best"]) < 0.1
    assert torch.count_nonzero(two["network"]["head.weight"][0]) == 0
