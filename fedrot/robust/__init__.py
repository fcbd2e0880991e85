"""Which clients of a round count, and how far, by the distances of their updates: no basis of a client changes it."""
