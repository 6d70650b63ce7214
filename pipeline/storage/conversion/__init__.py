"""TIFF and PNG sections into OME-Zarr."""
