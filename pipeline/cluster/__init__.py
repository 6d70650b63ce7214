"""Where Dask workers come from: this machine, a scheduler, Slurm or Kubernetes."""
