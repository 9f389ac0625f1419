"""Merged bundles that keep a mask for each task: each pass is the task's own network, and the switch is in inference.json."""

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import run
from tools.bundle import Bundle, read_json
from tools.bundle_code.modulation import bits
from tools.errors import UserError
from tools.merge import merge
from tools.task_vector import TaskVector


def merged(chain, output, tasks=("liver", "spleen"), **options):
    vectors = [str(chain.vectors[task]) for task in tasks]
    merge(output=str(output), pretrained=str(chain.pretrain), vectors=vectors, modulate=True, **options)
    return Bundle(output)


def logits(bundle, image, **knobs):
    with bundle.code(), torch.inference_mode():
        parser = bundle.parser(**{"precision": "float32", "inferer_output": "logits", **knobs})
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(bundle.state())
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        result = parser.get_parsed_content("inferer")(image, network.eval())
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        return result


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["emr", "task_arithmetic"])
def test_a_single_task_is_its_specialist_again(chain, tmp_path, image, method):
    bundle = merged(chain, tmp_path / "m", ["liver"], method=method, scale=0.3)
    specialist = Bundle(chain.specialists["liver"])
    torch.testing.assert_close(logits(bundle, image), logits(specialist, image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["emr", "task_arithmetic"])
def test_each_pass_is_the_papers_network(chain, tmp_path, image, method):
    """θ0 + scale · mask ⊙ unified, restated from the whole vectors."""
    bundle = merged(chain, tmp_path / "m", method=method, scale=0.4)
    vectors = [TaskVector(path) for path in chain.vectors.values()]
    flat = [np.concatenate([v.delta(name).ravel() for name in v.tensors]) for v in vectors]
    total = flat[0] + flat[1]
    if method == "emr":
        agreeing = [np.where(f * total > 0, np.abs(f), 0) for f in flat]
        unified = np.sign(total) * np.maximum(*agreeing)
        masks = [f * unified > 0 for f in flat]
        scales = [np.abs(f).sum() / np.abs(unified * m).sum() for f, m in zip(flat, masks)]
    else:
        unified, scales = total, [1, 1]
        masks = [np.abs(f) >= 0.4 * np.abs(total - f) for f in flat]
    got = logits(bundle, image)
    start = Bundle(chain.pretrain).state()
    for channel, (mask, scale) in enumerate(zip(masks, scales), start=1):
        place, state = 0, bundle.state()
        for name, tensor in vectors[0].tensors.items():
            size = int(np.prod(tensor.shape))
            own = (scale * mask * unified)[place : place + size].reshape(tensor.shape)
            state[name] = start[name] + torch.from_numpy(own).float()
            place += size
        with bundle.code(), torch.inference_mode():
            network = bundle.parser().get_parsed_content("network_def")
            network.load_state_dict(state)
            torch.testing.assert_close(got[:, channel], network.eval()(image)[:, channel], rtol=1e-3, atol=1e-4)
    assert (got[:, 0] == 0).all()


def test_the_switch_gives_the_shared_network_and_the_file_is_small(chain, tmp_path, image):
    bundle = merged(chain, tmp_path / "m", method="emr", scale=0.4)
    shared = logits(bundle, image, modulated=False)
    merge(
        output=str(tmp_path / "plain"), pretrained=str(chain.pretrain), vectors=[str(v) for v in chain.vectors.values()],
        method="emr", scale=0.4,
    )  # fmt: skip
    assert torch.equal(shared, logits(Bundle(tmp_path / "plain"), image))
    assert not torch.equal(shared, logits(bundle, image))
    size = (tmp_path / "m/models/modulators.pt").stat().st_size
    models = size / (4 * sum(int(np.prod(t.shape)) for t in TaskVector(chain.vectors["liver"]).tensors.values()))
    assert models < 1 + 2 / 32 + 0.05  # and what 100 small records weigh


@pytest.mark.parametrize("modulated", [True, False])
def test_labels_are_the_argmax_over_all_tasks(chain, tmp_path, image, modulated):
    bundle = merged(chain, tmp_path / "m", method="emr")
    labels = logits(bundle, image, modulated=modulated, inferer_output="labels")
    assert torch.equal(labels.long(), logits(bundle, image, modulated=modulated).argmax(1, keepdim=True))
    assert set(labels.unique().tolist()) > {0}


def test_a_modulated_bundle_runs_alone(chain, tmp_path):
    import shutil

    merged(chain, tmp_path / "m", method="emr")
    shutil.copytree(tmp_path / "m", tmp_path / "alone" / "copy")
    image = next((chain.dataset / "imagesTr").iterdir())
    words = ["monai.bundle", "run", "--config_file", tmp_path / "alone/copy/configs/inference.json"]
    words += ["--bundle_root", tmp_path / "alone/copy", "--dataset_dir", image]
    for switch in (True, False):
        run(*words, "--output_dir", tmp_path / str(switch), "--modulated", switch, PYTHONPATH="")
    maps = [next((tmp_path / str(switch)).glob("*.nii.gz")) for switch in (True, False)]
    both = [np.asarray(nibabel.load(path).dataobj) for path in maps]
    assert both[0].shape == both[1].shape == nibabel.load(image).shape
    assert set(np.unique(both[0])) <= {0, 1, 2}
    assert read_json(tmp_path / "m/configs/inference.json")["modulated"] is True


def test_what_masks_cannot_undo_is_refused(chain, tmp_path):
    for options, message in (
        ({"method": "ties"}, "there are masks for the methods emr and task_arithmetic, not for ties"),
        ({"method": "emr", "sparsify": "dare"}, "cannot be undone by masks"),
        ({"method": "task_arithmetic", "scale": (0.1, 0.2)}, "must have one scale for all tasks"),
    ):
        with pytest.raises(UserError, match=message):
            merged(chain, tmp_path / "m", **options)


def test_bits_come_back():
    mask = np.random.default_rng(0).random((3, 5, 7)) < 0.5
    packed = torch.from_numpy(np.packbits(mask.reshape(-1)))
    assert np.array_equal(bits(packed, torch.Size(mask.shape)).numpy(), mask)
