"""Models: found on disk, proven, compiled, inferred."""
