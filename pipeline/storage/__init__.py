"""Volumes read and written, and a run's ledger and target lock. File formats are known here alone.

A new source format is a module beside sources/zarr_volume.py, entered in sources/open.py and,
for `emsr view`, in viewer/data_source.py. A new codec of targets goes
into targets/ome_zarr_target.py or targets/precomputed_target.py, and its name into config/volume.py.
"""
