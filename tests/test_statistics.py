"""Statistics for fisher and regmean: what is measured is what the definitions say, and belongs to its task vector."""

import shutil

import pytest
import torch
from torch import nn

from tests.conftest import run
from tools.bundle import Bundle
from tools.errors import UserError
from tools.merge import merge
from tools.network import Structure
from tools.statistics import fisher_information, gram_matrices, gram_shape, layer_inputs, statistics
from tools.task_statistics import TaskStatistics, statistics_file
from tools.task_vector import TaskVector

EVERYWHERE = 10**9
LAYERS = {
    "convolution": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 7)),
    "strided": (nn.Conv3d(4, 6, (3, 1, 2), stride=(2, 1, 1), dilation=(1, 2, 2), padding=(1, 0, 2)), (1, 4, 7, 6, 5)),
    "grouped": (nn.Conv3d(4, 6, 3, padding="same", groups=2), (1, 4, 5, 5, 5)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 5)),
    "linear": (nn.Linear(5, 3), (2, 7, 5)),
    "transposed": (nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), (1, 4, 3, 4, 5)),
}


def matrices(layer):
    transposed = ["w"] if isinstance(layer, nn.ConvTranspose3d) else []
    structure = Structure({}, transposed, {"w": layer.groups} if getattr(layer, "groups", 1) > 1 else {})
    return torch.from_numpy(structure.as_matrices("w", layer.weight.detach().numpy()).copy())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layers_inputs_times_its_weight_are_its_outputs(kind):
    layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    with torch.no_grad():
        layer.bias.zero_()
        outputs = layer(inputs)
    seen, weight = layer_inputs(layer, inputs, EVERYWHERE), matrices(layer)
    if kind == "linear":
        torch.testing.assert_close((seen @ weight.mT)[0].reshape(outputs.shape), outputs)
    elif kind == "transposed":  # its kernel positions do not overlap: every output voxel comes from one input voxel
        weight = weight.reshape(*weight.shape[:2], seen.shape[2], -1)
        got = torch.einsum("gpi,goik->gopk", seen, weight).reshape(6, 3, 4, 5, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        torch.testing.assert_close(got.reshape(outputs.shape), outputs)
    else:
        got = (seen @ weight.mT).movedim(1, 2).flatten(0, 1)  # channels × places
        torch.testing.assert_close(got, outputs.transpose(0, 1).flatten(1))
    assert gram_shape(layer) == (seen.shape[0], seen.shape[2], seen.shape[2])
    few = layer_inputs(layer, inputs, 10)
    assert few.shape[1] == 10
    rows = {tuple(row) for row in seen.movedim(0, 1).flatten(1).tolist()}
    assert all(tuple(row) in rows for row in few.movedim(0, 1).flatten(1).tolist())


def test_gram_matrices_are_means_whatever_is_collected_at_once(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 3, 1))
    patches = [torch.randn(1, 6, 6, 6) for _ in range(3)]
    layers = {"0.weight": network[0], "2.weight": network[2]}
    together = dict(gram_matrices(network, layers, patches, EVERYWHERE))
    seen = torch.cat([layer_inputs(network[0], patch[None], EVERYWHERE)[0] for patch in patches])
    torch.testing.assert_close(together["0.weight"][0], seen.T @ seen / len(seen), rtol=1e-2, atol=1e-2)
    monkeypatch.setattr("tools.statistics.AT_ONCE", 1)
    for name, gram in gram_matrices(network, layers, patches, EVERYWHERE):
        torch.testing.assert_close(gram, together[name])


class Logistic(nn.Module):
    """One weight, the logit of one organ being weight · image; and a weight that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(2))

    def forward(self, image):
        return torch.cat([torch.zeros_like(image), self.weight * image], 1)


def test_fisher_information_is_that_of_logistic_regression():
    """Of one observation it is Σ x² · p (1 - p)."""
    torch.manual_seed(0)
    patches = [torch.randn(1, 4, 4, 4).bfloat16().float() for _ in range(3000)]
    values, trace = fisher_information(Logistic(), ["weight", "unused", "absent"], patches)
    x = torch.stack(patches)
    p = (0.7 * x).sigmoid()
    assert trace == pytest.approx((x.square() * p * (1 - p)).sum().item() / len(patches), rel=0.08)
    assert values["weight"].item() == pytest.approx(3) and values["unused"].tolist() == [0, 0]  # the mean is 1


@pytest.fixture(scope="module")
def measured(chain):
    words = ["--images", chain.dataset, "--scans", 1, "--patches", 4, "--places", 200]
    for task, bundle in chain.specialists.items():
        for method in ("fisher", "regmean") if task == next(iter(chain.specialists)) else ["fisher, regmean, fisher"]:
            one = ["--bundle", bundle, "--vector", chain.vectors[task], "--method", method]
            run("tools", "statistics", *one, *words)
    yield chain
    for file in chain.root.glob("*.*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_what_was_measured_merges(measured, tmp_path, method):
    vectors = ",".join(map(str, measured.vectors.values()))
    merge(str(tmp_path / "m"), pretrained=str(measured.pretrain), vectors=vectors, method=method)
    merged, average = Bundle(tmp_path / "m"), Bundle(measured.merged).state()
    differences = [not torch.equal(tensor, average[name]) for name, tensor in merged.state().items()]
    assert any(differences)
    specialists = [Bundle(folder).state() for folder in measured.specialists.values()]
    if method == "fisher":  # between the specialists, entry by entry
        for name, tensor in merged.state().items():
            if name not in merged.structure().head:
                low, high = torch.aminmax(torch.stack([s[name] for s in specialists]), dim=0)
                assert (tensor >= low - 1e-6).all() and (tensor <= high + 1e-6).all()
    recorded = merged.metadata["lineage"]["vectors"]
    for facts, vector in zip(recorded, measured.vectors.values(), strict=True):
        assert facts["statistics_sha256"] == TaskStatistics(TaskVector(vector), method).sha256


def test_statistics_are_those_of_their_vector_or_refused(measured, tmp_path):
    vectors = {task: shutil.copy(path, tmp_path) for task, path in measured.vectors.items()}
    options = {"pretrained": str(measured.pretrain), "vectors": ",".join(vectors.values()), "method": "fisher"}
    with pytest.raises(UserError, match=r"liver\.fisher\.safetensors not found: fisher needs it"):
        merge(str(tmp_path / "m"), **options)
    liver = statistics_file(vectors["liver"], "fisher")
    spleen = statistics_file(vectors["spleen"], "fisher")
    shutil.copy(statistics_file(measured.vectors["liver"], "fisher"), liver)
    shutil.copy(liver, spleen)
    with pytest.raises(UserError, match=r"has the statistics for fisher of liver .*, not those for fisher of spleen"):
        merge(str(tmp_path / "m"), **options)
    shutil.copy(statistics_file(measured.vectors["spleen"], "fisher"), spleen)
    whole = spleen.read_bytes()
    for damaged, reason in (
        (whole[: len(whole) // 2], "damaged|truncated|incomplete"),
        (whole[:-9000] + bytes([whole[-9000] ^ 1]) + whole[-8999:], "is damaged|not what was written"),
        (b"", "spleen.fisher.safetensors"),
    ):
        spleen.write_bytes(damaged)
        with pytest.raises(UserError, match=reason):
            merge(str(tmp_path / "m"), **options)
    assert not (tmp_path / "m").exists()


def test_what_cannot_be_measured_is_said(chain, tmp_path):
    options = {"vector": str(chain.vectors["liver"]), "images": str(chain.dataset)}
    with pytest.raises(UserError, match="did you mean 'fisher'"):
        statistics(str(chain.specialists["liver"]), method="fischer", **options)
    with pytest.raises(UserError, match="is not the task vector of"):
        statistics(str(chain.specialists["spleen"]), method="fisher", **options)
    shutil.copy(chain.vectors["liver"], tmp_path / "liver.safetensors")
    options["vector"] = str(tmp_path / "liver.safetensors")
    statistics_file(options["vector"], "fisher").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        statistics(str(chain.specialists["liver"]), method="fisher", scans=1, patches=1, **options)
    assert statistics_file(options["vector"], "fisher").read_text() == "mine"
