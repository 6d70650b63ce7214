"""From volume.yaml to a job: open what is there, fill in defaults, refuse contradictions. Writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from pipeline import __version__
from pipeline.base.errors import SourceError, TargetError, TransientError
from pipeline.base.geometry import Box
from pipeline.base.limits import MAX_TASKS
from pipeline.config import urls
from pipeline.config.volume import Config, NetworkConfig
from pipeline.inference.defaults import for_workers, lattice_for
from pipeline.inference.describe import describe
from pipeline.plan.plan import Plan
from pipeline.plan.price import output_voxels
from pipeline.plan.requests import RequestRates
from pipeline.plan.target_spec import TargetSpec
from pipeline.prepare import fills, layout
from pipeline.prepare.mask_reach import check_overlap
from pipeline.prepare.place import Begun, check_vacant, has_begun, lost_plan, nothing_run, recorded_begin
from pipeline.prepare.prepared import Prepared
from pipeline.prepare.specification import Choices, digest, recorded_network, specification
from pipeline.process.device import Facts
from pipeline.sections import bad_sections
from pipeline.sections.bad_sections import Detect
from pipeline.sections.survey import Survey, survey
from pipeline.storage.kv import Store
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.volume import Source, VolumeInfo
from pipeline.worker.job import Job


def prepare(config: Config, detect: Detect | None = None) -> Prepared:
    """Open the source's metadata and plan. Raises UserError.

    What volume.yaml leaves open is what an earlier run of this target has recorded, so that every command sees one
    plan, whoever runs it. Where there was none, the lattice follows from the volume, bad sections from `detect` (with
    source.bad_sections.detect, after everything else was found to be right), and precision and batch are float32 and 1
    until `settled` is told what the workers have.
    """
    target_url = _target_url(config)
    store = Store(urls.sidecar(target_url))
    recorded = recorded_begin(store, target_url, config.target.format)
    config = config.model_copy(update={"network": _stated(config.network, recorded)})
    network = describe(config.network)
    try:
        source = open_source(config.source)
        info = source.info
        mask = open_mask(config.source.mask, info).info if config.source.mask is not None else None
    except TransientError as error:
        raise SourceError(f"the source cannot be reached: {error}", "", "Check the url and the network") from None
    region = _region(config, info)
    network = dataclasses.replace(network, lattice=lattice_for(network, config.network, info.bounds))
    if mask is not None:
        check_overlap(mask, info, region)
    bad = bad_sections.listed(config.source.bad_sections, info)
    shapes = layout.choose(region.shape, network.scale, config.target, config.work.slab_shape)
    encoding = config.target.encoding or {"ome-zarr": "blosc-zstd", "precomputed": "raw"}[config.target.format]
    plan = Plan(
        info.bounds,
        region,
        shapes.slab_shape,
        network.scale,
        network.lattice,
        shapes.levels,
        shapes.fidelity,
        tuple(bad),
        lossy=encoding == "jpeg",
        leave_empty=config.source.bad_sections.output == "empty",
    )
    _within_budget(config, plan)
    if plan.tasks > MAX_TASKS:
        raise SourceError(
            f"{info.url} of {region.shape} voxels makes {plan.tasks:,} tasks",
            f"at most {MAX_TASKS:,}",
            "Check that its metadata states its true shape, raise work.slab_shape, or cut a source.box",
        )
    wanted = survey(config.source, info, plan, config.work.retries) if config.source.bad_sections.detect else None
    if wanted is not None:
        bad = dict(sorted((_detected(config, store, recorded, wanted, source, detect) | bad).items()))
        bad_sections.check_allowed(config.source.bad_sections, bad, info)
        plan = dataclasses.replace(plan, bad_sections=tuple(bad))
    return _prepared(Choices(config, info, mask, network, plan, encoding, bad, wanted), target_url, store, recorded)


def _prepared(choices: Choices, target_url: str, store: Store, recorded: Begun | None) -> Prepared:
    config, info, plan = choices.config, choices.source, choices.plan
    spec = specification(choices)
    later = fills.stated_later(recorded.spec if recorded else None, spec)
    spec = fills.as_begun(spec, later)
    voxel_nm = (info.voxel_size_nm[0], info.voxel_size_nm[1] / plan.scale, info.voxel_size_nm[2] / plan.scale)
    z, y, x = (c + s * v for c, s, v in zip(info.corner_nm, plan.region.start, info.voxel_size_nm, strict=True))
    target = TargetSpec(
        target_url,
        config.target.format,
        choices.encoding,
        plan.scale,
        voxel_nm,
        (z, y, x),
        plan.levels,
        plan.fidelity,
        {"emsr": __version__, "digest": digest(spec)} | spec | ({fills.KEY: later} if later else {}),
        recorded.name if recorded else urls.volume_name(target_url),
    )
    spec = spec | {"slab_shape": list(plan.slab_shape)}
    requests = config.work.requests_per_second
    job = Job(
        digest(spec),
        config.source,
        info.fingerprint,
        choices.network,
        plan,
        target,
        config.work.retries,
        config.work.stall_s,
        rates=RequestRates(requests.read, requests.write) if requests else RequestRates(),
        mask=choices.mask,
        access=config.target.access,
    )
    return Prepared(choices, job, spec, store, later)


def settled(prepared: Prepared, workers: Collection[Facts]) -> Prepared:
    """The same with the precision and batch that suit these workers, for a target that no run has begun."""
    choices = prepared.choices
    network = for_workers(choices.network, choices.config.network, choices.source.bounds, workers)
    changed = dataclasses.replace(choices, network=network)
    again = _prepared(changed, prepared.job.target.url, prepared.store, None)
    return dataclasses.replace(again, job=dataclasses.replace(again.job, run=prepared.job.run))


def _stated(network: NetworkConfig, recorded: Begun | None) -> NetworkConfig:
    """volume.yaml's network, with what an earlier run of it has recorded where it says nothing."""
    if (
        recorded is None or recorded.spec["network"]["name"] != network.name
    ):  # the target of another one is refused later
        return network
    return network.model_copy(
        update={key: value for key, value in recorded_network(recorded.spec).items() if getattr(network, key) is None}
    )


def _target_url(config: Config) -> str:
    kind, url = urls.split_format(config.target.url)
    if (kind is not None and (kind == "precomputed") != (config.target.format == "precomputed")) or kind in (
        "zarr2",
        "n5",
    ):
        raise TargetError(
            f"target.url begins with {kind}://, target.format is {config.target.format}",
            "one format",
            "Remove the prefix or change target.format",
        )
    if url.startswith(("http://", "https://")):
        raise TargetError(
            f"target.url {url} cannot be written: http is read only",
            "a path, s3:// or gs://",
            "Choose another target.url",
        )
    if not urls.bucket_and_path(url)[1]:
        raise TargetError(f"target.url {url} is a bucket's root", "a folder in it", "Append a name for the volume")
    others = {
        "source.url": config.source.url,
        "source.mask.url": config.source.mask.url if config.source.mask else None,
    }
    for key, other in others.items():
        theirs = urls.split_format(other)[1] if other else None
        if theirs and (theirs == url or theirs.startswith(url + "/") or url.startswith(theirs + "/")):
            raise TargetError(
                f"target.url {url} and {key} {theirs} lie in one another", "two places", "Choose another target.url"
            )
    return url


def _region(config: Config, info: VolumeInfo) -> Box:
    if config.source.box is None:
        return info.bounds
    box = config.source.box.box
    if not info.bounds.contains(box):
        raise SourceError(
            f"source.box {box} reaches out of the volume",
            f"a box inside {info.bounds} (z, y, x; LR voxels)",
            "Shrink source.box",
        )
    return box


def _detected(
    config: Config,
    store: Store,
    recorded: Begun | None,
    wanted: Survey,
    source: Source,
    detect: Detect | None,
) -> dict[int, str]:
    """The bad sections that are not listed: those of the plan beside the target, else those detected now."""
    if recorded is not None:
        theirs = bad_sections.detected(recorded.spec["source"]["bad_sections"])
        return {z: why for z, why in theirs.items() if z in wanted.sections}
    begun, target_url = has_begun(store), _target_url(config)
    if detect is None:
        raise lost_plan(store) if begun else nothing_run(target_url)
    if not begun:
        check_vacant(target_url, store)
    try:
        return detect(wanted, source)
    except TransientError as error:
        raise SourceError(
            f"the source cannot be reached: {error}",
            "",
            "Run the same command again: what was measured is kept",
        ) from None


def _within_budget(config: Config, plan: Plan) -> None:
    if config.work.budget is None:
        return
    size, most = output_voxels(plan), config.work.budget.output_bytes
    if size > most:
        raise TargetError(
            f"the output would be {size:,} bytes before compression, work.budget.output_bytes is {most:,}",
            "an output within the budget",
            "Cut a source.box, use fewer mips, or raise the budget",
        )
