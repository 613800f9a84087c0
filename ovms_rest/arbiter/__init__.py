"""gunicorn's hooks, and the loading and reloading of generations of workers."""
