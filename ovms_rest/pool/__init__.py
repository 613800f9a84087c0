"""The gunicorn side: how many workers, what happens around a fork, the form of gunicorn's own errors."""
