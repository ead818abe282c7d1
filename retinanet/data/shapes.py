"""The built-in data set: images of flat shapes, drawn by scikit-image, identical for the same seed.

It allows trying and testing everything without a download.
"""

from collections.abc import Callable

import numpy as np
from skimage.draw import random_shapes

from retinanet.data.dataset import DetectionDataset

CLASS_NAMES = ("circle", "rectangle", "triangle")
WHITE, INK = 255, ((0, 200),)


def draw_shapes(size: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image of one to four shapes that do not overlap; it depends on the seed alone.

    The image is [size, size, 3] uint8; its boxes are [G, 5] float32 (x1, y1, x2, y2, label), exact to the pixel.
    """
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), WHITE, dtype=np.uint8)
    boxes = []
    for _ in range(rng.integers(1, 5)):
        label = int(rng.integers(len(CLASS_NAMES)))
        shape, sides = CLASS_NAMES[label], {"min_size": size // 4, "max_size": size // 2}
        layer, _ = random_shapes((size, size), max_shapes=1, shape=shape, intensity_range=INK, rng=rng, **sides)
        inked = (layer != WHITE).any(axis=2)  # [size, size]
        ys, xs = inked.nonzero()
        x1, y1, x2, y2 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        if min(x2 - x1, y2 - y1) < size // 5 or (image[y1:y2, x1:x2] != WHITE).any():  # a sliver, or no room for it
            continue
        image[inked] = layer[inked]
        boxes.append((x1, y1, x2, y2, label))
    return image, np.array(boxes, dtype=np.float32).reshape(-1, 5)


class ShapesDataset(DetectionDataset):
    """Square images of shapes, kept in memory; sets of different seeds share no image."""

    in_files = False

    def __init__(self, num_images: int, seed: int = 0, size: int = 96, transform: Callable[[dict], dict] | None = None):
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        drawn = [draw_shapes(size, [seed, index]) for index in range(num_images)]
        self.images = [image for image, _ in drawn]
        annotations = np.concatenate([boxes for _, boxes in drawn])
        image_index = np.repeat(np.arange(num_images), [len(boxes) for _, boxes in drawn])
        names = [f"shapes-{seed}-{index}" for index in range(num_images)]
        sizes = np.full((num_images, 2), size)
        super().__init__(names, annotations, image_index, CLASS_NAMES, transform, declared_sizes=sizes)

    def load_image(self, index: int) -> np.ndarray:
        """[size, size, 3] uint8 RGB."""
        return self.images[index].copy()
