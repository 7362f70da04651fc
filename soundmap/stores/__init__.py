"""Where maps are kept: schema, Zarr store, GeoTIFF export, style, description, picture."""
