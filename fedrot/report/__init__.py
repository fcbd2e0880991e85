"""What an aggregation did: errors, angles, the result."""
