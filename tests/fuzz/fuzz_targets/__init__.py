"""The targets: each reads one kind of bytes from outside; ../README.md lists what they assert."""
