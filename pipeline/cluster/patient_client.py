"""A Dask client that does not wait for ever: a scheduler that stands still keeps its connections open."""

from __future__ import annotations

from typing import Any

from distributed import Client

from pipeline.base.waits import waiting


class PatientClient(Client):  # type: ignore[misc]
    """Whatever it asks of the scheduler is a wait of the command, which is said and ends."""

    def sync(self, *args: Any, **kwargs: Any) -> Any:
        with waiting("the Dask scheduler"):
            return super().sync(*args, **kwargs)

    @property
    def dashboard_link(self) -> Any:
        with waiting("the Dask scheduler"):
            return super().dashboard_link

    def close(self, *args: Any, **kwargs: Any) -> Any:
        with waiting("the Dask scheduler, to be left"):
            return super().close(*args, **kwargs)
