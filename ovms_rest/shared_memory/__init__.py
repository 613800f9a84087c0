"""What the processes of the service share, and the values that they count there."""
