"""A small trained model with its config and requests, served when no config is named."""
