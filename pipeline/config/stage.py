"""stage.yaml as frozen values: what `python -m pipeline.train` trains, on what, how long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from pipeline.base.errors import ConfigError, UserError
from pipeline.config import urls, yaml_file
from pipeline.config.volume import FillConfig, Url, Window

CHANGEABLE = {"steps", "rate", "periods", "precision"} | {
    f"losses.{name}" for name in ("codebook", "adversarial", "reference", "perceptual")
}
"""Keys of StageConfig.settings that may differ when a run goes on: what is left of it then follows the new ones."""
_APART: Any = {
    **dict.fromkeys(
        ("output", "checkpoint_every", "validate_every", "devices", "accelerator", "threads", "card", "half"), True
    ),
    "data": {"licence"},
}
"""Keys that decide no weight."""

_LATER_DEFAULTS = (("invert", False), ("missing_chunks", "error"))
"""Keys that checkpoints of earlier commits lack, which are told apart from theirs only where they are not these."""

EARLIER_WORDS = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}
"""What `precision` was called before, which stays allowed and stands in older checkpoints."""

CRITIC_SEES = 70
"""HR voxels across the patch of which models/discriminator makes one score: a smaller crop gives none."""


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Number = Annotated[float, BeforeValidator(_no_flag)]
Share = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Steps = Annotated[StrictInt, Field(ge=1, le=10**9)]
Precision = Annotated[
    Literal["float32", "tf32", "bfloat16", "float16"],
    BeforeValidator(lambda word: EARLIER_WORDS.get(word, word) if isinstance(word, str) else word),
]


class _Model(BaseModel):
    model_config = yaml_file.MODEL


class VolumeConfig(_Model):
    """An HR volume to train or validate on. `lr` is the LR volume of the same tissue where one was measured.

    `sections` is the half-open range of z that is used; `bad_sections` are left out. Both count from the first section.
    `intensity_window`, `invert` and `missing_chunks` are as in volume.yaml, and for `lr` too.
    """

    url: Url
    mip: Annotated[StrictInt, Field(ge=0)] = 0
    array: StrictStr | None = None
    intensity_window: Window | None = None
    invert: StrictBool = False
    missing_chunks: Literal["error"] | FillConfig = "error"
    sections: tuple[StrictInt, StrictInt] | None = None
    bad_sections: tuple[StrictInt, ...] = ()
    lr: Url | None = None

    @model_validator(mode="after")
    def _range(self) -> VolumeConfig:
        if self.sections is not None and not 0 <= self.sections[0] < self.sections[1]:
            raise ValueError(f"sections [first, one past the last] with 0 <= first < last, not {list(self.sections)}")
        return self


class DataConfig(_Model):
    """Volumes, and how samples are cut from them. `crop` and `drift` are HR voxels, `noise` is in grey values."""

    train: Annotated[tuple[VolumeConfig, ...], Field(min_length=1)]
    validate_on: tuple[VolumeConfig, ...] = ()
    licence: StrictStr
    crop: Annotated[StrictInt, Field(ge=32)]
    flips: StrictBool = True
    drift: Annotated[StrictInt, Field(ge=0)] = 0
    noise: Weight = 0.0
    validation_crop: Annotated[StrictInt, Field(ge=32)] = 512
    validation_windows: Annotated[StrictInt, Field(ge=1, le=10**6)] = 8


class NetworkConfig(_Model):
    """The network that is trained, and the files it starts from.

    `vqgan`, `indexer` and `flow` are files that earlier stages wrote; `flow` may also be SPyNet's published file.
    `start` holds weights of the whole network to continue with. `untrained` names those of `flow` and `vgg19` that
    stay as they were drawn at random. `mpf`, `pod` and `three_da` switch these modules off
    where they are false; `alone` fills every window with its centre section. `vgg19` holds the weights of the mask's
    network.
    """

    scale: Literal[8, 16]
    preset: Literal["paper", "small"] = "paper"
    mpf: StrictBool = True
    pod: StrictBool = True
    three_da: StrictBool = True
    vqgan: yaml_file.LocalPath | None = None
    indexer: yaml_file.LocalPath | None = None
    flow: yaml_file.LocalPath | None = None
    vgg19: yaml_file.LocalPath | None = None
    untrained: tuple[Literal["flow", "vgg19"], ...] = ()
    alone: StrictBool = False
    start: yaml_file.LocalPath | None = None


class LossConfig(_Model):
    """Weights of the losses beside the stage's main one, and files of the networks that compute them."""

    squares: StrictBool = False
    codebook: Weight = 10.0
    adversarial: Weight = 0.05
    adversarial_from: Annotated[StrictInt, Field(ge=0)] = 40_000
    critic_width: Steps = 64
    reference: Weight = 0.0
    vgg: yaml_file.LocalPath | None = None
    perceptual: Weight = 0.0
    lpips_alex: yaml_file.LocalPath | None = None

    @model_validator(mode="after")
    def _files(self) -> LossConfig:
        if self.reference and self.vgg is None:
            raise ValueError("losses.vgg, the file of VGG19 or VGG16, where losses.reference is not 0")
        if self.perceptual and self.lpips_alex is None:
            raise ValueError("losses.lpips_alex, a file of LPIPS weights, where losses.perceptual is not 0")
        return self


class StageConfig(_Model):
    """One stage.yaml. `rate` is Adam's first learning rate; `periods` are the lengths of its cosine cycles in steps.

    `precision` is chosen where it is absent: the checkpoint's, else what the devices compute in (training/precision).
    """

    stage: Literal["flow", "vqgan", "indexer", "network"]
    output: yaml_file.LocalPath
    data: DataConfig
    network: NetworkConfig
    losses: LossConfig = LossConfig()
    steps: Steps
    batch: Steps = 8
    centres: Steps = 1
    rate: Annotated[Number, Field(gt=0, le=1)] = 4e-4
    periods: tuple[Steps, ...] = ()
    average: Share = 0.0
    quantise_from: Annotated[StrictInt, Field(ge=0)] = 0
    revive_every: Annotated[StrictInt, Field(ge=0)] = 0
    flow_shift: Weight = 16.0
    flow_bend: Weight = 4.0
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    validate_every: Steps = 5000
    checkpoint_every: Steps = 5000
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Steps = 1
    threads: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    precision: Precision | None = None
    half: StrictBool = False
    card: StrictStr = ""

    @model_validator(mode="after")
    def _needs(self) -> StageConfig:
        for key in self._earlier():
            if getattr(self.network, key) is None:
                also = f", or network.untrained: [{key}]" if key in ("flow", "vgg19") else ""
                raise ValueError(f"network.{key}, the file of an earlier stage{also}, for stage {self.stage}")
        if self.data.crop % (4 * self.network.scale):
            wanted = f"a multiple of {4 * self.network.scale} HR voxels (four LR voxels)"
            raise ValueError(f"data.crop as {wanted}, not {self.data.crop}")
        judged = self.losses.adversarial > 0 and self.steps > self.losses.adversarial_from
        if self.stage == "vqgan" and judged and self.data.crop < CRITIC_SEES:
            raise ValueError(
                f"data.crop of at least {CRITIC_SEES} HR voxels, not {self.data.crop}, where losses.adversarial is not "
                f"0 and steps go beyond losses.adversarial_from"
            )
        return self

    def _earlier(self) -> list[str]:
        """The keys of `network` that this stage needs: frozen parts, which would be random without their files."""
        n = self.network
        if self.stage == "indexer":
            return ["vqgan"]
        if self.stage != "network":
            return []
        needed = ["vqgan", "indexer"] if n.mpf else []
        needed += ["vgg19"] if n.mpf and n.preset == "paper" and "vgg19" not in n.untrained else []
        return needed + (["flow"] if n.pod and "flow" not in n.untrained else [])

    def settings(self, contents: Mapping[str, str]) -> dict[str, Any]:
        """Everything that decides the weights, by dotted key: a checkpoint is resumed only under the same.

        `contents` says by the same keys what lies at a path or url, which themselves do not count.
        """
        flat: dict[str, Any] = {}

        def add(value: Any, place: str) -> None:
            if isinstance(value, dict):
                for key, child in value.items():
                    if (key, child) not in _LATER_DEFAULTS:
                        add(child, f"{place}.{key}" if place else key)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                for i, child in enumerate(value):
                    add(child, f"{place}[{i}]")
            else:
                flat[place] = value

        add(self.model_dump(mode="json", exclude=_APART), "")
        flat["batch times devices"] = flat.pop("batch") * self.devices
        return flat | dict(contents)


def load(path: str | Path) -> StageConfig:
    """Read and check stage.yaml. Relative paths and URLs start from its folder and come back absolute.

    Raises ConfigError with all problems.
    """
    path = Path(path)
    config, lines = yaml_file.read(path, StageConfig, "stage.yaml")
    base = path.resolve().parent
    problems: list[str] = []

    def absolute(model: Any, place: tuple[str | int, ...]) -> Any:
        changed: dict[str, Any] = {}
        for key in type(model).model_fields:
            value = getattr(model, key)
            if isinstance(value, BaseModel):
                changed[key] = absolute(value, (*place, key))
            elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
                changed[key] = tuple(absolute(item, (*place, key, i)) for i, item in enumerate(value))
            elif isinstance(value, Path):
                changed[key] = base / value
            elif key in ("url", "lr") and value is not None:
                try:
                    changed[key] = urls.normalise(value, base)
                except UserError as error:
                    at = (*place, key)
                    problems.append(f"{path}:{yaml_file.line(lines, at)}: {'.'.join(map(str, at))}: {error}")
        return model.model_copy(update=changed)

    found: StageConfig = absolute(config, ())
    if problems:
        raise ConfigError(problems)
    return found
