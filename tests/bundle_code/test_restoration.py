"""Images without labels, the loss of restoring them, and the picture."""

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine

from tools.bundle_code.restoration import RestorationLoss, RestorationPicture, restored, unlabelled_images


@pytest.fixture
def folder(tmp_path):
    def make(name, count, part=""):
        place = tmp_path / name / part
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            nibabel.save(
                nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), place / f"{name}{part}_{i}.nii.gz"
            )
        return tmp_path / name

    return make


def names(items):
    return {item["image"].rpartition("/")[2] for item in items}


def test_images_of_several_folders_are_split_by_name(folder):
    dataset = folder("dataset", 20, "imagesTr")
    folder("dataset", 5, "imagesTs")
    plain = folder("plain", 9)
    train, val = (names(unlabelled_images([dataset, plain], part)) for part in ("train", "val"))
    assert len(train) == 26
    assert len(val) == 3  # a tenth
    assert not train & val
    assert not any("imagesTs" in name for name in train | val)
    assert names(unlabelled_images([plain, dataset], "val")) == val
    assert names(unlabelled_images([plain, dataset], "val", seed=1)) != val
    assert len(unlabelled_images(dataset / "imagesTs", "val", held_out=0)) == 1


def test_too_few_images(folder, tmp_path):
    with pytest.raises(ValueError, match="two images are needed at least"):
        unlabelled_images(folder("one", 1), "train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        unlabelled_images(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="part must be"):
        unlabelled_images(folder("two", 2), "test")


def test_the_loss_in_closed_form():
    logits = torch.zeros(2, 2, 4, 4, 4)
    logits[:, 0] = 100  # background has no part in it
    target = torch.full((2, 1, 4, 4, 4), 0.9)
    target[:, :, :2] = 0.5
    loss = RestorationLoss()
    assert loss(logits, target).item() == pytest.approx(0.4**2 / 2)
    mask = torch.zeros_like(target)
    mask[:, :, 2] = 1  # a quarter of the voxels, all of them wrong by 0.4
    assert loss(logits, torch.cat([target, mask], 1)).item() == pytest.approx(0.4**2)
    assert loss(logits, torch.cat([target, 0 * mask], 1)) == 0
    with pytest.raises(ValueError, match=r"restores 1 channel\(s\), the image has 3"):
        loss(logits, torch.zeros(2, 3, 4, 4, 4))


def test_the_loss_counts_each_channel_of_an_image():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 2, 4, 4, 4)
    mask = (torch.rand(2, 1, 4, 4, 4) < 0.5).float()
    error = (logits[:, 1:].sigmoid() - target)[mask.bool().expand(-1, 2, -1, -1, -1)] ** 2
    assert RestorationLoss()(logits, torch.cat([target, mask], 1)).item() == pytest.approx(error.mean().item())


def test_an_image_that_is_not_between_0_and_1_is_restored_by_the_channel_itself(tmp_path):
    logits, target = torch.full((1, 2, 8, 8, 8), -3.0), torch.full((1, 1, 8, 8, 8), -2.5)
    assert RestorationLoss(linear=True)(logits, target).item() == pytest.approx(0.25)
    engine = Engine(lambda *_: {"label": target, "image": target, "pred": (logits, torch.zeros(4, 1, 2, 2))})
    RestorationPicture(tmp_path, linear=True).attach(engine)
    engine.run([0], max_epochs=1)
    assert len(list(tmp_path.glob("restored_epoch_0001.png"))) == 1


def test_the_background_row_of_a_head_gets_no_gradient():
    head = torch.nn.Conv3d(4, 2, 1)
    RestorationLoss()(head(torch.rand(1, 4, 4, 4, 4)), torch.rand(1, 1, 4, 4, 4)).backward()
    assert (head.weight.grad[0] == 0).all()
    assert (head.weight.grad[1] != 0).all()


def test_the_picture_shows_three_columns(tmp_path):
    from matplotlib.image import imread

    logits = torch.stack([torch.zeros(2, 8, 8, 8), torch.full((2, 8, 8, 8), 9.0)], 1)  # restored: all white
    output = {"label": torch.zeros(2, 1, 8, 8, 8), "image": torch.rand(2, 1, 8, 8, 8), "pred": logits}
    engine = Engine(lambda *_: output)
    RestorationPicture(tmp_path).attach(engine)
    engine.run([0, 1], max_epochs=1)
    (path,) = tmp_path.glob("*.png")
    assert path.name == "restored_epoch_0001.png"
    picture = imread(path)[..., 0]
    left, right = picture[40:, : picture.shape[1] // 4], picture[40:, -picture.shape[1] // 4 :]
    assert left.max() < 0.1
    assert np.median(right) > 0.9
    assert (restored(logits) > 0.99).all()
