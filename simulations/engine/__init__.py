"""The engine: grids, federation, journal."""
