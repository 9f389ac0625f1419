"""Keep a task vector, the backbone minus its starting point, short and out of the way of others while it is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

HEADER = "task-vector-"  # of a task vector's safetensors metadata; a version follows


class ConstrainTaskVector:
    """After every step of the optimiser, project the backbone to the nearest one whose task vector is allowed.

    - Orthogonal to given task vectors, in each tensor by itself (as orthogonal gradient descent keeps steps out of the way of
      earlier tasks: Farajtabar et al., AISTATS 2020; here it is the sum of all steps), so that in a merge neither adds to the
      other, nor takes from it. A tensor of no more entries than there are given vectors stays as it was.
    - In a ball around the starting point, |τ| ≤ ``norm_budget`` · |θ0| (Gouk et al., "Distance-Based Regularisation of Deep
      Networks for Fine-Tuning", ICLR 2021, with the Euclidean norm over the whole backbone).

    Both hold exactly, up to float32, whenever the weights are validated or saved.

    Args:
        network: a plain module (not wrapped for distributed training).
        pretrained: the starting point's weights by name, head left out.
        bundle_root: the bundle; its metadata says which starting point that is.
        norm_budget: the longest that the task vector may be, as a share of the starting point's length; None for any.
        orthogonal_to: files of task vectors from the same starting point.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a budget that is not positive; a file that is no task vector, of another network or starting point, or that
            has NaN or infinite values.
    """

    def __init__(
        self,
        network: nn.Module,
        pretrained: Mapping[str, Tensor],
        bundle_root: str | Path,
        norm_budget: float | None = None,
        orthogonal_to: Sequence[str] = (),
    ) -> None:
        if norm_budget is not None and not norm_budget > 0:
            raise ValueError(
                f"norm_budget must be positive, got {norm_budget}: it is a share of the starting point's length"
            )
        known = {name: p for name, p in network.named_parameters() if name in pretrained}
        self.parameters = list(known.values())
        self.start = [pretrained[name].detach().to(p).clone() for name, p in known.items()]
        self.longest = None if norm_budget is None else norm_budget * float(nn.utils.get_total_norm(self.start))
        taken = [_read(Path(path), known, Path(bundle_root)) for path in orthogonal_to]
        self.taken = [_basis([vector[name].to(p) for vector in taken]) for name, p in known.items()] if taken else None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, _: Engine | None = None) -> None:
        deltas = [parameter - start for parameter, start in zip(self.parameters, self.start, strict=True)]
        if self.taken is not None:
            deltas = [
                delta - (basis @ (basis.T @ delta.reshape(-1))).view_as(delta)
                for delta, basis in zip(deltas, self.taken, strict=True)
            ]
        if self.longest is not None:
            length = float(nn.utils.get_total_norm(deltas))
            if length > self.longest:
                deltas = [delta * (self.longest / length) for delta in deltas]
            elif self.taken is None:
                return
        for parameter, start, delta in zip(self.parameters, self.start, deltas, strict=True):
            parameter.copy_(start + delta)


def _basis(tensors: Sequence[Tensor]) -> Tensor:
    """Orthonormal columns that span some tensors of one shape, (entries, rank)."""
    columns = torch.stack([tensor.reshape(-1) for tensor in tensors], 1)
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > 1e-5 * sizes.max().clamp(min=1e-30)]


def _read(path: Path, parameters: Mapping[str, Tensor], bundle_root: Path) -> dict[str, Tensor]:
    """The backbone's part of a task vector."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: orthogonal_to names files of task vectors")
    try:
        with safe_open(path, "pt") as file:
            headers = [text for key, text in (file.metadata() or {}).items() if key.startswith(HEADER)]
            stored = {f"backbone/{name}": name for name in parameters}
            vector = {stored[key]: file.get_tensor(key) for key in stored.keys() & set(file.keys())}
        start = json.loads(headers[0])["pretrained_sha256"]
    except (SafetensorError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable task vector ({type(error).__name__}: {error})") from None
    lineage = json.loads((bundle_root / "configs" / "metadata.json").read_text()).get("lineage", {})
    if start != lineage.get("pretrained_sha256"):
        raise ValueError(f"{path} comes from another starting point than this bundle: it cannot be orthogonal to it")
    for name, parameter in parameters.items():
        if name not in vector or vector[name].shape != parameter.shape:
            raise ValueError(f"{path} is of another network: tensor {name} is missing, or has another shape")
        if not torch.isfinite(vector[name]).all():
            raise ValueError(f"{path}: tensor {name} has NaN or infinite values")
    return vector
