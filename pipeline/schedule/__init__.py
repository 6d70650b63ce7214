"""A run: leases to Dask workers, receipts into the ledger, progress and report."""
