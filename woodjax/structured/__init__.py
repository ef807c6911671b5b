"""Structured pruning: channels, plans and networks that are really smaller."""
