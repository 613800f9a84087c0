"""HTTP: Falcon resources, the reading of bodies, and the one table from errors to statuses."""
