"""A preload for `dask scheduler`: it does not compare every new worker's packages with those of all others.

That comparison alone grows with the square of the workers, so ten thousand take it minutes before anything begins.
"""

from __future__ import annotations

from distributed import versions

versions.error_message = lambda *args, **kwargs: {}
