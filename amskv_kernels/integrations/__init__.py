"""Patches for public model code, applied in place and undone on demand."""
