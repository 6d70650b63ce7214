"""TIFF and PNG sections into OME-Zarr: image files read, and the volume written."""
