"""Makes the quickstart's data: a phantom of serial-section EM, with the HR truth beside the LR source.

    python examples/make_phantom.py [--out DIR] [--shape Z Y X]

`hr.zarr` is what a microscope at full resolution would have seen, `lr.zarr` the same tissue 8 times coarser in y and x.
Nothing in it is recorded tissue: profiles, membranes and organelles are drawn by the rules below, the same ones every
time.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from models.degrade import degrade
from pipeline.base.command import guarded
from pipeline.base.errors import TargetError, UserError

SCALE = 8
SHAPE = (16, 1024, 1024)
SEED = 7
HR_VOXEL_NM = (45.0, 4.0, 4.0)
LR_VOXEL_NM = (45.0, 4.0 * SCALE, 4.0 * SCALE)
RECIPE = 1
"""Raised with every change of the drawing, so that data of an older recipe is not taken for today's."""

MARK = "emsr_example"
"""Attribute of an example volume: what made it, and the sha256 of its voxels."""

Float = NDArray[np.float32]

MARGIN = 160
BLOCK = 16
NEIGHBOURS = 14
WARP = ((250.0, 50.0, 22.0), (90.0, 15.0, 9.0), (42.0, 6.0, 6.0), (17.0, 1.3, 3.0))
"""Octaves of the tissue's wrinkling: wavelength in HR pixels, amplitude in HR pixels, persistence in sections."""


def phantom(shape: tuple[int, int, int], seed: int = SEED) -> NDArray[np.uint8]:
    """A stack of HR sections (z, y, x). The same shape and seed give the same voxels."""
    depth, height, width = shape
    whole = 2 * BLOCK
    tissue = Tissue.grow((depth, -(-height // whole) * whole, -(-width // whole) * whole), seed)
    return np.stack([tissue.section(z)[:height, :width] for z in range(depth)])


def make(out: Path, shape: tuple[int, int, int] = SHAPE, seed: int = SEED) -> bool:
    """Write `hr.zarr` and `lr.zarr` into `out`; False where the same data are there already.

    Raises UserError for a shape that 8 does not divide, TargetError where something else is in the place.
    """
    if min(shape) < 1 or shape[1] % SCALE or shape[2] % SCALE:
        raise UserError(
            f"--shape {' '.join(map(str, shape))}",
            f"HR voxels Z Y X, Y and X multiples of {SCALE}",
            "For example --shape 16 1024 1024",
        )
    recipe = {"recipe": RECIPE, "shape": list(shape), "seed": seed}
    from pipeline.convert import convert  # here: `phantom` is used where no readers of TIFF are installed

    places = {out / "hr.zarr": HR_VOXEL_NM, out / "lr.zarr": LR_VOXEL_NM}
    missing = [path for path in places if not holds(path, recipe)]
    if not missing:
        return False
    hr = phantom(shape, seed)
    for path in missing:
        voxels = hr if path.name == "hr.zarr" else np.stack([degrade(section, SCALE) for section in hr])
        convert(
            voxels,
            path,
            places[path],
            attributes={MARK: {**recipe, "sha256": hashlib.sha256(voxels.tobytes()).hexdigest()}},
        )
    return True


def holds(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether `path` holds, undamaged, what `recipe` gives; False where nothing is there."""
    if not path.exists() or not any(path.iterdir()):
        return False
    try:
        group = zarr.open_group(path, mode="r")
        mark = dict(cast(dict[str, Any], group.attrs[MARK]))
        whole = hashlib.sha256(np.asarray(cast(zarr.Array[Any], group["0"])[:]).tobytes()).hexdigest() == mark.pop(
            "sha256"
        )
    except Exception:
        mark, whole = {}, False
    if mark == recipe and whole:
        return True
    raise TargetError(
        f"{path} holds something else, or damaged data",
        "an empty place, or this example",
        "Remove it, or give another folder with --out",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Make a phantom of serial-section EM: hr.zarr (truth) and lr.zarr (source)."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "data",
        help="folder to write to (default: data beside this script)",
    )
    parser.add_argument(
        "--shape",
        nargs=3,
        type=int,
        default=SHAPE,
        metavar=("Z", "Y", "X"),
        help="shape of hr.zarr (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    return guarded(lambda: _report(args.out, make(args.out, tuple(args.shape))))


def _report(out: Path, made: bool) -> int:
    print(f"{out / 'lr.zarr'} and {out / 'hr.zarr'} {'are written' if made else 'are there already, nothing to do'}")
    return 0


def _step(low: float, high: float, value: Float) -> Float:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _resize(field: Float, shape: tuple[int, int]) -> Float:
    return np.asarray(Image.fromarray(field).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Neurites:
    """One row per neurite: a capsule that wanders from section to section, and what its cytoplasm looks like."""

    centre: Float
    velocity: Float
    axis: Float
    half_length: Float
    radius: Float
    tone: Float
    vesicles: Float
    phase: Float

    def at(self, z: float) -> tuple[Float, Float]:
        """Centres (n, 2) and radii (n,) in section `z`; radii swell and shrink along a neurite."""
        sway = np.stack([np.sin(0.4 * z + self.phase), np.cos(0.31 * z + 2 * self.phase)], axis=1)
        swell = 1 + np.float32(0.22) * np.sin(np.float32(0.45 * z) + 3 * self.phase)
        return self.centre + self.velocity * np.float32(z) + (4 * sway).astype(np.float32), self.radius * swell


@dataclass(frozen=True)
class Mitochondrion:
    owner: int
    offset: Float
    angle: float
    half_axes: tuple[float, float]
    middle: float
    half_depth: float
    crista: float


@dataclass(frozen=True)
class Tissue:
    """Everything that is drawn once per volume; `section` cuts it."""

    shape: tuple[int, int, int]
    seed: int
    neurites: Neurites
    mitochondria: tuple[Mitochondrion, ...]
    synapses: Float
    drift: Float

    @classmethod
    def grow(cls, shape: tuple[int, int, int], seed: int) -> Tissue:
        depth, height, width = shape
        rng = np.random.default_rng([seed, 0])
        neurites = _pack(rng, np.array([height, width]) + 2 * MARGIN)
        large = np.flatnonzero(neurites.radius > 24)
        along = (
            neurites.axis
            * (neurites.half_length * rng.uniform(-1, 1, len(neurites.radius)).astype(np.float32))[:, None]
        )
        mitochondria = tuple(
            Mitochondrion(
                owner=int(i),
                offset=along[i] + rng.uniform(-0.3, 0.3, 2).astype(np.float32) * neurites.radius[i],
                angle=float(rng.uniform(0, np.pi)),
                half_axes=(a := float(rng.uniform(16, 30)), a * float(rng.uniform(1.0, 2.0))),
                middle=float(rng.uniform(-4, depth + 4)),
                half_depth=float(rng.uniform(4, 14)),
                crista=float(rng.uniform(7, 11)),
            )
            for i in rng.permutation(large)[: int(len(large) * 0.85) + 1]
        )
        area = (height + 2 * MARGIN) * (width + 2 * MARGIN)
        spots = rng.uniform(0, 1, (int(area / 9000) + 1, 4)).astype(np.float32)
        synapses = spots * np.array([height, width, depth + 4, 2.5], np.float32) + np.array([0, 0, -2, 0.8], np.float32)
        drift = np.cumsum(rng.normal(0, 2.4, (depth, 2)), axis=0).astype(np.float32)
        return cls(shape, seed, neurites, mitochondria, synapses, drift - drift.mean(axis=0))

    def noise(self, key: int, z: float, shape: tuple[int, int], wavelength: float, persistence: float = 1.0) -> Float:
        """A smooth random field (y, x) of unit variance; sections closer than `persistence` have similar fields."""
        layer, t = divmod(z / persistence, 1.0)
        out = np.zeros(shape, np.float32)
        for k, weight in ((int(layer), 1 - t), (int(layer) + 1, t)):
            if weight == 0:
                continue
            rng = np.random.default_rng([self.seed, key, k + 1_000_000])
            cells = (shape[0] / wavelength, shape[1] / wavelength)
            lattice = rng.standard_normal((int(cells[0]) + 5, int(cells[1]) + 5), dtype=np.float32)
            dy, dx = rng.uniform(1, 2, 2)
            box = (dx, dy, dx + cells[1], dy + cells[0])
            layer_field = np.asarray(
                Image.fromarray(lattice).resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box)
            )
            out += np.float32(weight / np.hypot(t, 1 - t)) * layer_field
        return out / np.float32(0.72)

    def positions(self, z: int, at: float, step: int) -> Float:
        """Where in the tissue the pixels of section `z` lie, (2, y, x) on every `step`-th pixel: drift, cutting, and
        wrinkles at depth `at`.
        """
        shape = (self.shape[1] // step, self.shape[2] // step)
        rows, columns = (np.arange(n, dtype=np.float32) * step + (step - 1) / 2 for n in shape)
        grid = np.stack(np.broadcast_arrays(rows[:, None], columns))
        for c in range(2):
            grid[c] += self.drift[z, c] + 1.2 * self.noise(10 + c, z, shape, 170 / step)
            for octave, (wavelength, amplitude, persistence) in enumerate(WARP):
                grid[c] += np.float32(amplitude) * self.noise(
                    20 + 2 * octave + c, at, shape, wavelength / step, persistence
                )
        return grid

    def profiles(self, where: Float, z: float) -> tuple[NDArray[np.int64], Float]:
        """Which neurite holds each position of `where` (2, y, x), and how far its membrane is, in HR pixels."""
        height, width = where.shape[1:]
        block = min(BLOCK, height, width)
        ny, nx = height // block, width // block
        centre, radius = self.neurites.at(z)
        start = centre - self.neurites.axis * self.neurites.half_length[:, None]
        double = 2 * self.neurites.half_length

        middles = where[:, block // 2 :: block, block // 2 :: block].reshape(2, -1, 1)
        far = _capsule(middles, start.T[:, None, :], self.neurites.axis.T[:, None, :], double[None], radius[None])
        near = np.argpartition(far, min(NEIGHBOURS, far.shape[1] - 1), axis=1)[:, :NEIGHBOURS].reshape(ny, nx, -1)

        tiles = where.reshape(2, ny, block, nx, block)
        first = np.full(tiles.shape[1:], np.inf, np.float32)
        second = first.copy()
        owner = np.zeros(tiles.shape[1:], np.int64)
        for k in range(near.shape[2]):
            i = near[:, None, :, None, k]
            distance = _capsule(
                tiles, np.moveaxis(start[i], -1, 0), np.moveaxis(self.neurites.axis[i], -1, 0), double[i], radius[i]
            )
            closer = distance < first
            second = np.where(closer, first, np.minimum(second, distance))
            owner = np.where(closer, i, owner)
            first = np.minimum(first, distance)
        first, second = first.reshape(height, width), second.reshape(height, width)
        slope = sum((np.gradient(first, axis=a) - np.gradient(second, axis=a)) ** 2 for a in (0, 1))
        return owner.reshape(height, width), (second - first) / np.maximum(_soft(np.sqrt(slope), 3), 0.25)

    def section(self, z: int) -> NDArray[np.uint8]:
        """Section `z`, uint8 (y, x): the mean of three depths of its thickness, then texture, organelles, camera."""
        shape = self.shape[1:]
        rng = np.random.default_rng([self.seed, 1, z])
        half = (shape[0] // 2, shape[1] // 2)
        membrane = np.zeros(half, np.float32)
        for at in (z - 0.33, z + 0.33, float(z)):
            where = self.positions(z, at, 2)
            owner, wall = self.profiles(where, at)
            wall *= 2
            membrane += (1 - _step(1.7, 3.9, wall)) / 3
        image = _resize(_soft(self.neurites.tone[owner], 1), shape).copy()
        owner = owner.repeat(2, axis=0).repeat(2, axis=1)
        wall, membrane = _resize(wall, shape), np.clip(_resize(membrane, shape), 0, 1)

        patch = self.noise(50, z, shape, 45, 3)
        crowd = self.neurites.vesicles[owner]
        image += 7 * patch
        image -= (14 + 26 * crowd) * np.clip(self.noise(51, z, shape, 3.6) - 0.7 + 0.25 * patch, 0, 2)
        image -= 9 * np.clip(self.noise(52, z, shape, 7), -0.5, 2)
        image -= self._reticulum(z, wall)
        image -= self._vesicles(rng, crowd * _step(-0.6, 0.9, patch + crowd), wall)
        self._draw_mitochondria(image, z, np.stack([_resize(w, shape) for w in where]), owner, wall)
        dark = np.clip(membrane + self._densities(z, wall), 0, 1)
        image = image * (1 - dark) + (34 + 10 * self.noise(53, z, shape, 20)) * dark
        return self._camera(rng, z, image)

    def _reticulum(self, z: int, wall: Float) -> Float:
        """Thin winding lines: the zero contour of a field, kept in patches away from membranes."""
        field = self.noise(60, z, wall.shape, 34, 3)
        slope = np.hypot(*np.gradient(field)).astype(np.float32)
        line = np.exp(-((field / np.maximum(slope, 0.01) / 1.6) ** 2))
        return 48 * line * _step(0.35, 0.9, self.noise(61, z, wall.shape, 60, 4)) * _step(5, 9, wall)

    def _vesicles(self, rng: np.random.Generator, density: Float, wall: Float) -> Float:
        """Rings of about 40 nm where `density` (0..1) is high, a few with a dense core. They last one section."""
        pad = 12
        canvas = np.zeros((wall.shape[0] + 2 * pad, wall.shape[1] + 2 * pad), np.float32)
        grid = np.mgrid[-pad : pad + 1, -pad : pad + 1].astype(np.float32)
        spots = rng.uniform(0, 1, (wall.size // 75, 5))
        ys, xs = (spots[:, 0] * wall.shape[0]).astype(int), (spots[:, 1] * wall.shape[1]).astype(int)
        keep = (spots[:, 2] < density[ys, xs] + 0.025) & (wall[ys, xs] > 8)
        for y, x, (size, shade) in zip(ys[keep], xs[keep], spots[keep, 3:], strict=True):
            distance = np.hypot(grid[0] + size - 0.5, grid[1] + shade - 0.5)
            ring = np.exp(-(((distance - 3.4 - 1.4 * size) / 1.25) ** 2)) * (48 + 50 * shade)
            stamp = 85 * (1 - _step(4.5, 7, distance)) if shade > 0.985 else ring - 8 * (distance < 2.5)
            here = canvas[y : y + 2 * pad + 1, x : x + 2 * pad + 1]
            np.copyto(here, stamp, where=np.abs(stamp) > np.abs(here))
        return canvas[pad:-pad, pad:-pad]

    def _draw_mitochondria(self, image: Float, z: int, where: Float, owner: NDArray[np.int64], wall: Float) -> None:
        """Ellipsoids inside their neurite: double membrane, grey matrix, cristae that wind across it."""
        centre, _ = self.neurites.at(z)
        wind = 3.2 * self.noise(70, z, image.shape, 26, 4)
        filled = _step(-0.9, 0.2, self.noise(71, z, image.shape, 16, 4))
        every = 8
        coarse = where[:, ::every, ::every]
        for m in self.mitochondria:
            reach = 1 - ((z - m.middle) / m.half_depth) ** 2
            if reach <= 0.05:
                continue
            middle = centre[m.owner] + m.offset
            box = np.hypot(coarse[0] - middle[0], coarse[1] - middle[1]) < max(m.half_axes) + 2 * every
            if not box.any():
                continue
            rows, columns = np.flatnonzero(box.any(axis=1)) * every, np.flatnonzero(box.any(axis=0)) * every
            part = np.s_[rows[0] : rows[-1] + every, columns[0] : columns[-1] + every]
            dy, dx = where[0][part] - middle[0], where[1][part] - middle[1]
            c, s = np.cos(m.angle), np.sin(m.angle)
            across, along = c * dy + s * dx, c * dx - s * dy
            short, long = m.half_axes[0] * np.sqrt(reach), m.half_axes[1] * np.sqrt(reach)
            depth = (1 - np.hypot(across / short, along / long)) * short + 0.35 * wind[part]
            depth = np.where(owner[part] == m.owner, np.minimum(depth, wall[part] - 7), -9)
            stripe = np.abs(((along + wind[part]) / m.crista + 0.1 * across / m.crista) % 1 - 0.5) * m.crista
            lumen = _step(4.0, 7.0, depth) * filled[part]
            matrix = (
                96 - 44 * lumen * np.exp(-(((stripe - 2.0) / 1.1) ** 2)) + 42 * lumen * np.exp(-((stripe / 1.1) ** 2))
            )
            body = np.where(depth < 2.6, 40, matrix)
            alpha = _step(-0.8, 0.8, depth)
            image[part] = image[part] * (1 - alpha) + body * alpha

    def _densities(self, z: int, wall: Float) -> Float:
        """Dark blots of synapses on membranes, a few sections deep."""
        out = np.zeros_like(wall)
        for y, x, middle, half_depth in self.synapses:
            if abs(z - middle) > half_depth:
                continue
            y0, x0 = (int(np.clip(v - 20, 0, n - 1)) for v, n in zip((y, x), wall.shape, strict=True))
            part = np.s_[y0 : y0 + 40, x0 : x0 + 40]
            gy, gx = np.ogrid[0 : out[part].shape[0], 0 : out[part].shape[1]]
            blot = np.exp(-(((gy - 20) ** 2 + (gx - 20) ** 2) / 110)) * (1 - _step(4, 11, wall[part]))
            out[part] = np.maximum(out[part], 0.95 * blot)
        return out

    def _camera(self, rng: np.random.Generator, z: int, image: Float) -> NDArray[np.uint8]:
        """Focus, uneven light, grain, and the section's own contrast and brightness."""
        image = _soft(image, 1)
        image = image + 4 * self.noise(80, z, image.shape, 400)
        grain = rng.standard_normal((2, *image.shape), dtype=np.float32)
        image = image + 9 * grain[0] + 19 * _soft(grain[1], 1)
        contrast, light = 1 + rng.normal(0, 0.03), rng.normal(0, 3)
        return np.clip(np.rint((image - 128) * contrast + 128 + light), 0, 255).astype(np.uint8)


def _soft(image: Float, times: int) -> Float:
    """`times` passes of the (1, 2, 1) filter along both axes."""
    for _ in range(times):
        for axis in (0, 1):
            padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
            low, high = np.delete(padded, [-1, -2], axis), np.delete(padded, [0, 1], axis)
            image = 0.5 * image + 0.25 * (low + high)
    return image


def _capsule(points: Float, start: Float, axis: Float, length: Float, radius: Float) -> Float:
    """Signed distance of points to capsules. The leading axis of `points`, `start` and `axis` is (y, x), the rest
    broadcasts.
    """
    dy, dx = points[0] - start[0], points[1] - start[1]
    t = np.clip(dy * axis[0] + dx * axis[1], 0, length)
    return np.hypot(dy - t * axis[0], dx - t * axis[1]) - radius


def _pack(rng: np.random.Generator, area: NDArray[np.int64]) -> Neurites:
    """Capsules thrown from large to small, each kept where it hardly overlaps the ones already there."""
    rows: list[tuple[float, ...]] = []
    kept = np.zeros((0, 6), np.float32)
    mega = area.prod() / 1e6
    for count, low, high, stretch in ((12, 50, 85, 1.6), (110, 26, 46, 2.0), (700, 12, 22, 2.5), (2200, 7, 11, 1.5)):
        for _ in range(int(count * mega) + 1):
            radius, angle = rng.uniform(low, high), rng.uniform(0, np.pi)
            half = radius * stretch * rng.uniform(0, 1) ** 2
            middle = rng.uniform(0, 1, 2) * area - MARGIN
            axis = np.array([np.sin(angle), np.cos(angle)])
            ends = np.array([middle - axis * half, middle, middle + axis * half], np.float32).T[:, :, None]
            k = kept.T[:, None, :]
            if len(kept) and (_capsule(ends, k[0:2], k[2:4], k[4], k[5]) < 0.75 * radius).any():
                continue
            kept = np.vstack([kept, np.array([*(middle - axis * half), *axis, 2 * half, radius], np.float32)])
            rows.append((*middle, *axis, half, radius))
    table = np.array(rows, np.float32)
    n = len(table)
    glia = rng.uniform(0, 1, n) < 0.07
    tone = np.where(glia, rng.uniform(95, 120, n), rng.normal(172, 10, n)).astype(np.float32)
    vesicles = np.where(glia, 0.25, np.clip(rng.uniform(-0.35, 1.0, n), 0, 1)).astype(np.float32)
    velocity = (rng.normal(0, 2.2, (n, 2)) * np.minimum(1, 25 / table[:, 5:6])).astype(np.float32)
    return Neurites(
        table[:, 0:2],
        velocity,
        table[:, 2:4],
        table[:, 4],
        table[:, 5],
        tone,
        vesicles,
        rng.uniform(0, 6.28, n).astype(np.float32),
    )


if __name__ == "__main__":
    sys.exit(main())
