"""What a Dask worker runs: a slab, and a lease of slabs."""
