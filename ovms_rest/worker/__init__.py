"""The gunicorn worker: event loop, connections, HTTP/1.1, queue."""
