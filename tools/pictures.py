"""Pictures of label maps over their image, side by side, in three planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
Masks = Mapping[str, np.ndarray]


def draw_case(
    image: np.ndarray, affine: np.ndarray, columns: Mapping[str, Masks], path: str | Path, title: str = ""
) -> None:
    """Draw organ masks over an image: one column per model, one row per plane, the first column being the reference.

    Each plane is cut where the reference has most organ voxels. The reference's outline is drawn in white over the other
    columns, so that what is missing and what is too much can be seen.

    Args:
        image: intensities ``(X, Y, Z)``.
        affine: voxel to world, 4x4, RAS millimetres.
        columns: for each column's title, boolean masks ``(X, Y, Z)`` by organ.
        path: PNG to write.
        title: over the whole picture.
    """
    import nibabel
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    orientation = nibabel.orientations.io_orientation(affine)

    def upright(array: np.ndarray) -> np.ndarray:
        return nibabel.orientations.apply_orientation(array, orientation)

    size = nibabel.affines.voxel_sizes(affine)[np.argsort(orientation[:, 0])]
    image = upright(np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0))
    columns = {name: {organ: upright(mask) for organ, mask in masks.items()} for name, masks in columns.items()}
    organs = list(dict.fromkeys(organ for masks in columns.values() for organ in masks))
    palette = colormaps["tab10" if len(organs) <= 10 else "tab20"]
    colours = {organ: palette(i % palette.N)[:3] for i, organ in enumerate(organs)}
    reference = np.any(list(next(iter(columns.values())).values()), axis=0)
    low, high = np.percentile(image, [1, 99])

    extent = np.array(image.shape) * size
    heights = [extent[1], extent[2], extent[2]]
    width = max(extent[0], extent[1])
    scale = 2.4 / width
    figure = Figure(figsize=(2.5 * len(columns), scale * sum(heights) + 1.1), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PLANES), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (_plane, axis) in enumerate(PLANES.items()):
        cut = int(np.argmax(reference.sum(axis=tuple(a for a in range(3) if a != axis))))
        in_plane = [a for a in range(3) if a != axis]
        aspect = size[in_plane[1]] / size[in_plane[0]]
        outline = np.take(reference, cut, axis).T
        for column, (name, masks) in enumerate(columns.items()):
            ax = axes[row][column]
            picture = np.clip((np.take(image, cut, axis).T - low) / max(high - low, 1e-6), 0, 1)
            picture = np.repeat(picture[..., None], 3, axis=2)
            for organ, mask in masks.items():
                inside = np.take(mask, cut, axis).T
                picture[inside] = 0.45 * picture[inside] + 0.55 * np.array(colours[organ])
            flip = axis != 0  # axial and coronal as radiologists look: the patient's right on the left of the picture
            ax.imshow(picture[:, ::-1] if flip else picture, origin="lower", aspect=aspect, interpolation="nearest")
            if column and outline.any() and min(outline.shape) > 1:  # a single row of voxels has no outline
                ax.contour(outline[:, ::-1] if flip else outline, levels=[0.5], colors="white", linewidths=0.6)
            ax.axis("off")
            if row == 0:
                ax.set_title(name, color="white", fontsize=9, parse_math=False)
    legend = [Patch(color=colour, label=organ) for organ, colour in colours.items()]
    across = min(len(legend), max(2, 2 * len(columns)))
    below = {"loc": "lower center", "ncols": across, "fontsize": 8, "labelcolor": "white", "frameon": False}
    for text in figure.legend(handles=legend, **below).get_texts():
        text.set_parse_math(False)
    if title:
        figure.suptitle(title, color="white", fontsize=8, x=0.01, y=0.995, ha="left", parse_math=False)
    bottom = (0.1 + 0.2 * -(-len(legend) // across)) / figure.get_figheight()
    figure.tight_layout(rect=(0, bottom, 1, 1), pad=0.4)
    figure.savefig(path, dpi=110, facecolor="black")
