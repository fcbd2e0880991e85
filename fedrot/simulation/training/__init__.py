"""Local training of all clients in one pass through the shared base model."""
