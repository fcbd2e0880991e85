"""Rounds over time: whole, streamed, merged between servers, resumed."""
