"""Memory and sockets shared by the processes of the service, and the values counted in them."""
