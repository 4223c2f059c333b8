"""A data source of one's own: examples that are computed when they are read.

Anything with `event_shape`, `num_classes`, `__len__` and `__getitem__` will do. The loader
shuffles, batches, and goes on bit for bit where it was.
"""

import dataclasses

import numpy as np

from jaxdiff.data import make_loader


@dataclasses.dataclass(frozen=True)
class Discs:
    """Grey images of a disc, with its radius as a condition and its side as a class."""

    size: int = 16
    count: int = 1000
    num_classes: int = 2

    @property
    def event_shape(self):
        """(H, W, C)."""
        return self.size, self.size, 1

    def __len__(self):
        """How many; each is drawn from its own number."""
        return self.count

    def __getitem__(self, index):
        """{"x": the image, "cond": {"label": left or right, "radius": in pixels}}."""
        rng = np.random.default_rng((7, index))
        label, radius = int(rng.integers(2)), rng.uniform(1.5, 3.5)
        centre = self.size * np.asarray([0.5, 0.25 + 0.5 * label])
        y, x = np.mgrid[: self.size, : self.size] + 0.5
        distance = np.hypot(y - centre[0], x - centre[1])
        image = np.clip(2 * (radius - distance), -1, 1).astype(np.float32)
        cond = {"label": np.int32(label), "radius": np.float32(radius)}
        return {"x": image[..., None], "cond": cond}


loader = make_loader(Discs(), 32, seed=0)
batches = iter(loader)
batch = next(batches)
print({name: values.shape for name, values in batch["cond"].items()}, batch["x"].shape)
area = ((batch["x"] + 1) / 2).sum((1, 2, 3))
np.testing.assert_allclose(area, np.pi * batch["cond"]["radius"] ** 2, rtol=0.15)

# Where it was: the state is JSON, and belongs to this source, seed and order.
state = batches.get_state()
expected = next(batches)
again = iter(loader)
again.set_state(state)
np.testing.assert_array_equal(next(again)["x"], expected["x"])
