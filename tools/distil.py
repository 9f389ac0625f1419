"""``distil``: learn the coefficients of a merge by gradients, so that it gives the specialists' own masks on a few scans.

One coefficient for each tensor and task, as in AdaMerging (Yang et al., ICLR 2024); not by entropy, which empty masks minimise,
but by reproducing the soft masks of each specialist (the family of ProDistill, ICML 2025, and SyMerge), on patches around what
the specialists see, with a loss on organs rather than on background. With labels in the place of the specialists' masks the
coefficients are trained under supervision, as the code of U-Net Transplant (Lumetti et al., MICCAI 2025) means to; entropy, the
published baseline, is there to be compared with. The result is an ordinary recipe, with a file of heads if those are learned too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from tools.bundle import Bundle
from tools.errors import UserError, at_least, nearest
from tools.heads import free_entries, stacked_heads, unstacked_heads
from tools.instantiate import window_size
from tools.labelled_patches import labelled_patches
from tools.labels import renamed_labels
from tools.lineage import backbone_sha256
from tools.merge import HEADS_FILE, check_vectors, head_key, merge_recipe, split_paths
from tools.network import output_argument
from tools.output import check_output
from tools.recipe import Recipe
from tools.scans import choose_scans, patches_on_organs
from tools.task_vector import TaskVector
from tools.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tools.specialists import Specialists

    Loss = Callable[[Tensor, Tensor], Tensor]

OBJECTIVES = ("teachers", "labels", "entropy")
HELD_OUT = 4  # one patch in so many is not learned from, but says which step was best


def distil(
    pretrained: str,
    vectors: str | Sequence[str],
    images: str,
    output: str,
    part: str = "",
    split_file: str = "",
    scans: int = 4,
    patches: int = 16,
    patch_size: int = 0,
    steps: int = 200,
    batch_size: int = 2,
    learning_rate: float = 0.02,
    heads: bool = False,
    head_learning_rate: float = 0.001,
    seed: int = 0,
    objective: str = "teachers",
    labels: object = None,
    coefficients: str = "tensor",
    overwrite: bool = False,
) -> None:
    """Merge by task arithmetic with a coefficient for each tensor and task, learned from a few scans.

    Args:
        pretrained: the starting point, a bundle with weights.
        vectors: task vector files, separated by commas, in the order of the output channels.
        images: folder of images, or an nnU-Net dataset, whose labels only the objective "labels" looks at.
        output: folder of the merged bundle; its docs/recipe.yaml has the coefficients.
        part: of an nnU-Net dataset: "train", "val" or "test" of its split; default: all labelled cases.
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        scans: how many to use, chosen at random.
        patches: from each of them.
        patch_size: edge of the patches, voxels; default: the starting point's.
        steps: of Adam.
        batch_size: patches in a step.
        learning_rate: of the coefficients.
        heads: learn the tasks' heads too; they are then beside the recipe, in docs/heads.safetensors.
        head_learning_rate: of the heads.
        seed: of the scans, the patches and their order.
        objective: "teachers": the specialists' own masks, without labels; "labels": the dataset's labels, by Dice and
            cross-entropy; "entropy": sure voxels (AdaMerging), without labels, which may end in empty masks.
        labels: of the objective "labels": the dataset's for organs that are called otherwise: "{liver: 6}".
        coefficients: one for each "tensor" and task, or one for each "task".
        overwrite: replace the output if it exists.
    """
    import torch

    from tools.specialists import rebuild

    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("coefficients", coefficients, ("tensor", "task")),
    ):
        if value not in known:
            raise UserError(f"--{name} must be {' or '.join(known)}, got {value!r}{nearest(str(value), known)}")
    at_least(1, scans=scans, patches=patches, steps=steps, batch_size=batch_size)
    at_least(0, patch_size=patch_size, learning_rate=learning_rate, head_learning_rate=head_learning_rate)
    start = Bundle(pretrained)
    files = split_paths(vectors)
    if not files:
        raise UserError("no task vectors to merge")
    weights, tasks = start.weights(), [TaskVector(path) for path in files]
    check_vectors(files, tasks, start, weights)
    if backbone_sha256(weights, tasks[0].facts.structure) != tasks[0].facts.pretrained_sha256:
        raise UserError(f"{files[0]} (task {tasks[0].task}) comes from another starting point than {start.path}")
    check_output(output, overwrite, inputs=[pretrained, *files])  # before anything is learned
    torch.manual_seed(seed)
    student = Student(start, weights, tasks, one_each=coefficients == "task")
    size = window_size(start, patch_size)
    recipe = Recipe(pretrained, files, "task_arithmetic", {"scale": round(1 / len(tasks), 6)})
    if objective == "labels":
        pool = Pool.of_labels(recipe, images, part, split_file, scans, size, patches, seed, labels)
    else:
        cases = choose_scans(images, start, part, split_file, scans, seed)
        pool = Pool.of_specialists(start, rebuild(pretrained, files), cases, size, patches, seed)
    loss = entropy_of([len(task.facts.labels) for task in tasks]) if objective == "entropy" else masks_loss
    held_out = pool.split()[1]
    found = foreground(student, held_out, batch_size)
    before, after = learn(
        student, pool, steps, batch_size, learning_rate, head_learning_rate if heads else 0.0, loss=loss
    )
    print(f"loss on held-out patches: {before:.4f} as the average, {after:.4f} as learned")
    left = foreground(student, held_out, batch_size)
    print(f"voxels of the patches that are labelled: {found:.2%} as the average, {left:.2%} as learned")
    if left < found / 2:
        print("warning: what was learned labels less than half of that; look at its masks before you use it")
    scales = [[round(float(c), 6) for c in row] for row in student.coefficients.tolist()]
    if coefficients == "task":
        equal = recipe.parameters["scale"]
        recipe.parameters["scale"] = scales[0]  # but statistics count alike, as they did in training
        statistics = tasks[0].facts.structure.statistics
        recipe.overrides = [{"tensors": name, "parameters": {"scale": equal}} for name in statistics]
    else:
        recipe.overrides = [
            {"tensors": name, "parameters": {"scale": row}} for name, row in zip(student.names, scales, strict=True)
        ]
    with tempfile.TemporaryDirectory() as folder:
        if heads:
            recipe.heads = str(Path(folder) / HEADS_FILE)
            save_file(student.learned_heads(), recipe.heads)
        merge_recipe(recipe, output, overwrite=overwrite)


class Student:
    """The merged network as a function of its coefficients.

    Args:
        start: the starting point.
        weights: of it.
        tasks: the task vectors.
        one_each: one coefficient for each task, which all tensors share.

    Attributes:
        names: of the backbone's tensors.
        coefficients: tensors × tasks, or 1 × tasks; 1/T at first.
        head: the stacked head's tensors by name, at first the tasks' own.
    """

    def __init__(
        self, start: Bundle, weights: WeightsFile, tasks: Sequence[TaskVector], one_each: bool = False
    ) -> None:
        import torch

        from tools.bundle_code.stacked_head import without_spare_channels

        self.bundle = start
        self.tasks = tasks
        structure = tasks[0].facts.structure
        backbone = [n for n in weights.entries if n not in structure.head and n not in structure.aliases]
        self.names = [n for n in backbone if n in tasks[0].tensors and n not in structure.statistics]
        with start.code():
            self.device = start.parser().get_parsed_content("device")
        self.base = {n: self._on_device(weights.array(n)) for n in backbone}
        self.deltas = [{n: self._on_device(task.delta(n).astype(np.float32)) for n in task.tensors} for task in tasks]
        means = {n: self.base[n] + sum(delta[n] for delta in self.deltas) / len(tasks) for n in structure.statistics}
        self.shared = self.base | means
        stacked = stacked_heads(structure, [task.head for task in tasks])
        self.head = {name: self._on_device(tensor) for name, tensor in stacked.items()}
        shown, spare = 1 + sum(len(task.facts.labels) for task in tasks), structure.spare_channels(len(tasks))
        self.network = without_spare_channels(self._network(shown + spare, self.shared | self.head), shown)
        self.coefficients = torch.full(
            (1 if one_each else len(self.names), len(tasks)), 1 / len(tasks), device=self.device
        )

    def __call__(self, image: Tensor, coefficients: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """Logits (N, 1 + ΣC, …) of the network merged with these coefficients and this head.

        In float32: bfloat16 rounds away much of what a small step of a coefficient changes.
        """
        import torch

        from tools.bundle_code.inferers import full_size

        merged = {
            name: self.base[name] + sum(c * delta[name] for c, delta in zip(row, self.deltas, strict=True))
            for name, row in zip(self.names, coefficients.expand(len(self.names), -1), strict=True)
        }
        state = self.shared | merged | self.head | head
        return full_size(torch.func.functional_call(self.network, state, (image,), tie_weights=True))

    def free_head(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The parameters of the head, to be learned, and which of their entries may change."""
        free = free_entries(self.tasks[0].facts.structure, [task.head for task in self.tasks])
        names = [name for name, _ in self.network.named_parameters() if name in self.head]
        return {name: (self.head[name].clone(), self._on_device(free[name])) for name in names}

    def learned_heads(self) -> dict[str, np.ndarray]:
        """The heads of all tasks, as a recipe's file has them."""
        stacked = {name: tensor.cpu().numpy() for name, tensor in self.head.items()}
        organs = [len(task.facts.labels) for task in self.tasks]
        heads = unstacked_heads(self.tasks[0].facts.structure, stacked, organs)
        return {head_key(task, name): t for task, head in zip(self.tasks, heads) for name, t in head.items()}

    def _network(self, out_channels: int, state: dict[str, Tensor]) -> nn.Module:
        from monai.bundle import ConfigParser

        definition = self.bundle.network_def()
        definition[output_argument(definition)] = out_channels
        with self.bundle.code():
            network = ConfigParser({"network": definition}).get_parsed_content("network")
        network.load_state_dict(state, strict=False)
        return network.to(self.device).eval().requires_grad_(False)

    def _on_device(self, array: np.ndarray) -> Tensor:
        import torch

        return torch.from_numpy(np.array(array, order="C")).to(self.device)


@dataclass
class Pool:
    """Patches, and masks of them: the specialists' soft ones, or those of the labels.

    Attributes:
        images: (P, in, …).
        masks: probabilities (P, ΣC, …), half precision.
    """

    images: Tensor
    masks: Tensor

    @classmethod
    def of_specialists(
        cls,
        start: Bundle,
        specialists: Specialists,
        cases: Sequence[dict[str, Any]],
        size: Sequence[int],
        patches: int,
        seed: int,
    ) -> Pool:
        """Segment scans with every specialist and crop patches around what they see, each organ as often as another."""
        import torch

        pairs = patches_on_organs(start, specialists, cases, size, patches, seed)
        images, masks = zip(*((image, mask.half()) for image, mask in pairs), strict=True)
        return cls(torch.stack(images), torch.stack(masks))

    @classmethod
    def of_labels(
        cls,
        recipe: Recipe,
        dataset_dir: str,
        part: str,
        split_file: str,
        scans: int,
        size: Sequence[int],
        patches: int,
        seed: int,
        labels: object = None,
    ) -> Pool:
        """Crop patches around the labelled organs of a merge, each as often as another.

        Raises:
            UserError: it is not a dataset, or lacks an organ.
        """
        import torch

        if not (Path(dataset_dir) / "dataset.json").is_file():
            raise UserError(f"--objective labels needs an nnU-Net dataset with labels, and {dataset_dir} is none")
        with tempfile.TemporaryDirectory() as folder:
            merge_recipe(recipe, Path(folder) / "merged", quiet=True)
            merged = Bundle(Path(folder) / "merged")
            where = dataset_dir, part, split_file
            renamed = renamed_labels(labels, [merged])
            images, (truth,) = labelled_patches([merged], *where, scans, patches, size, seed, renamed)
        return cls(images, torch.cat([truth == channel for channel in range(1, 1 + len(merged.labels))], 1).half())

    def split(self) -> tuple[Pool, Pool]:
        """To learn from, and held out.

        Raises:
            UserError: there is nothing to hold out.
        """
        import torch

        if len(self.images) < HELD_OUT:
            raise UserError(f"{len(self.images)} patches are too few to learn from: raise --patches or --scans")
        held = torch.arange(len(self.images)) % HELD_OUT == HELD_OUT - 1
        return Pool(self.images[~held], self.masks[~held]), Pool(self.images[held], self.masks[held])


def learn(
    student: Student,
    pool: Pool,
    steps: int,
    batch_size: int,
    learning_rate: float,
    head_learning_rate: float = 0.0,
    loss: Loss | None = None,
) -> tuple[float, float]:
    """Set the student's coefficients, and its head, to the best of some steps of Adam; those it has, when none is better.

    Args:
        student: is changed.
        pool: patches with masks.
        steps: of Adam.
        batch_size: patches in a step.
        learning_rate: of the coefficients.
        head_learning_rate: of the head; at zero it stays as it is.
        loss: of logits and masks; default: ``masks_loss``.

    Returns:
        The loss on the held-out patches before and after.
    """
    import torch

    loss = loss or masks_loss
    training, held_out = pool.split()
    coefficients = student.coefficients.clone().requires_grad_()
    free = student.free_head() if head_learning_rate else {}
    head = {name: tensor.requires_grad_() for name, (tensor, _) in free.items()}
    rates = [{"params": [coefficients], "lr": learning_rate}, {"params": [*head.values()], "lr": head_learning_rate}]
    optimizer = torch.optim.Adam(rates)
    before = best = validate(student, held_out, coefficients, head, batch_size, loss)
    order: list[int] = []
    with tqdm(total=steps, desc="coefficients", disable=None, leave=False) as bar:
        for step in range(1, steps + 1):
            if len(order) < batch_size:
                order += torch.randperm(len(training.images)).tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            error = loss(
                student(training.images[chosen].to(student.device), coefficients, head),
                training.masks[chosen].to(student.device),
            )
            optimizer.zero_grad()
            error.backward()
            for name, (_, entries) in free.items():
                head[name].grad *= entries
            optimizer.step()
            bar.update()
            if step % max(1, steps // 10) == 0:
                score = validate(student, held_out, coefficients, head, batch_size, loss)
                bar.set_postfix(loss=f"{score:.4f}")
                if score < best:
                    best, student.coefficients = score, coefficients.detach().clone()
                    student.head |= {name: tensor.detach().clone() for name, tensor in head.items()}
    return before, best


def validate(
    student: Student,
    pool: Pool,
    coefficients: Tensor,
    head: Mapping[str, Tensor],
    batch_size: int,
    loss: Loss | None = None,
) -> float:
    """Mean loss over a pool, by default ``masks_loss``."""
    import torch

    loss, losses = loss or masks_loss, []
    with torch.inference_mode():
        for start in range(0, len(pool.images), batch_size):
            part = slice(start, start + batch_size)
            logits = student(pool.images[part].to(student.device), coefficients, head)
            losses.append(loss(logits, pool.masks[part].to(student.device)).item())
    return float(np.mean(losses))


def foreground(student: Student, pool: Pool, batch_size: int) -> float:
    """The share of a pool's voxels that the merge labels as an organ."""

    def share(logits: Tensor, _: Tensor) -> Tensor:
        return (logits[:, 1:].amax(1) > logits[:, 0]).float().mean()

    return validate(student, pool, student.coefficients, {}, batch_size, share)


def masks_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice over the organs that a specialist sees in a patch, plus binary cross-entropy, against its soft masks.

    Shapes:
        logits (N, 1 + ΣC, …), whose first channel is background and left out, and probabilities (N, ΣC, …), to a scalar.
    """
    import torch

    masks, logits = masks.float(), logits[:, 1:]
    probabilities = logits.sigmoid().flatten(2)
    flat = masks.flatten(2)
    dice = 1 - (2 * (probabilities * flat).sum(2) + 1) / (probabilities.square().sum(2) + flat.square().sum(2) + 1)
    seen = (flat.amax(2) > 0.5).float()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks)
    return (dice * seen).sum() / seen.sum().clamp(min=1) + cross_entropy


def entropy_of(organs: Sequence[int]) -> Loss:
    """AdaMerging's objective (Yang et al., ICLR 2024, section 3.2) voxel by voxel: the entropy of each task's own softmax.

    Args:
        organs: how many each task has; a task's softmax is over background and these.

    Returns:
        Of logits (N, 1 + ΣC, …), and masks, which it does not look at: the mean over voxels and tasks, nats.
    """
    import torch

    def entropy(logits: Tensor, _: Tensor) -> Tensor:
        background, *tasks = torch.split(logits, [1, *organs], 1)
        logs = [torch.cat([background, task], 1).log_softmax(1) for task in tasks]
        return torch.stack([-(log.exp() * log).sum(1).mean() for log in logs]).mean()

    return entropy
