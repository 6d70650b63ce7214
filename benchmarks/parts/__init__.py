"""What several benchmarks share: made tissue and jobs over it, stand-ins for networks, Dask in processes of its own."""
