"""Falcon resources, one per route, and the table from errors to statuses."""
