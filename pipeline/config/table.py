"""table.yaml as frozen values: which volumes are scored against which truth, by which metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt, model_validator

from pipeline.base.errors import ConfigError, UserError
from pipeline.config import urls, yaml_file
from pipeline.config.cluster import Line
from pipeline.config.volume import FillConfig, Url, Window

Metric = Literal["psnr", "ssim", "ssim_gaussian", "lpips_alex", "lpips_vgg", "dists"]


class _Model(BaseModel):
    model_config = yaml_file.MODEL


class VolumeConfig(_Model):
    """An SR volume (`sr`) and its ground truth (`gt`). Where `lr` is given, its bicubic enlargement is scored too.

    `sections` is the half-open range of z that is scored, counted from the first section; by default all of them. With
    `crop` the truth and SR may have only a part in common, which is scored. Which part that is, their positions say, or
    with `align: first_voxels` nothing but the voxels' numbers. Voxels where `mask` is 0 are left out. `missing_chunks`
    is the grey value of chunks that are absent. `intensity_window` is for volumes that are not uint8; `invert` makes
    255 - v of truth and LR, as the run did with its source.
    """

    name: Line
    sr: Url
    gt: Url
    lr: Url | None = None
    intensity_window: Window | None = None
    invert: StrictBool = False
    sections: tuple[StrictInt, StrictInt] | None = None
    crop: StrictBool = False
    align: Literal["positions", "first_voxels"] = "positions"
    mask: Url | None = None
    missing_chunks: Literal["error"] | FillConfig = "error"

    @model_validator(mode="after")
    def _range(self) -> VolumeConfig:
        if self.sections is not None and not 0 <= self.sections[0] < self.sections[1]:
            raise ValueError(f"sections [first, one past the last] with 0 <= first < last, not {list(self.sections)}")
        return self


class WeightsConfig(_Model):
    """Files with the weights of the perceptual metrics. Those that are not named are fetched from the internet."""

    lpips_alex: yaml_file.LocalPath | None = None
    vgg16: yaml_file.LocalPath | None = None
    dists: yaml_file.LocalPath | None = None


class TableConfig(_Model):
    """One table.yaml."""

    volumes: Annotated[tuple[VolumeConfig, ...], Field(min_length=1)]
    output: yaml_file.LocalPath
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("psnr", "ssim")
    weights: WeightsConfig = WeightsConfig()

    @model_validator(mode="after")
    def _names(self) -> TableConfig:
        names = [volume.name for volume in self.volumes]
        if len(set(names)) < len(names):
            raise ValueError("a name of its own for every volume")
        return self


def load(path: str | Path) -> TableConfig:
    """Read and check table.yaml. Relative paths and URLs start from its folder and come back absolute.

    Raises ConfigError with all problems.
    """
    path = Path(path)
    config, lines = yaml_file.read(path, TableConfig, "table.yaml")
    base = path.resolve().parent
    problems: list[str] = []

    def absolute(volume: VolumeConfig, i: int) -> VolumeConfig:
        changed: dict[str, str] = {}
        for key in ("sr", "gt", "lr", "mask"):
            url = getattr(volume, key)
            try:
                changed |= {} if url is None else {key: urls.normalise(url, base)}
            except UserError as error:
                problems.append(f"{path}:{yaml_file.line(lines, ('volumes', i, key))}: volumes.{i}.{key}: {error}")
        return volume.model_copy(update=changed)

    volumes = tuple(absolute(volume, i) for i, volume in enumerate(config.volumes))
    if problems:
        raise ConfigError(problems)
    files = {
        key: base / value for key in WeightsConfig.model_fields if (value := getattr(config.weights, key)) is not None
    }
    weights = config.weights.model_copy(update=files)
    return config.model_copy(update={"volumes": volumes, "weights": weights, "output": base / config.output})
