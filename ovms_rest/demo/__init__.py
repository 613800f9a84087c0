"""A small trained model, its config and sample requests, served by default."""
