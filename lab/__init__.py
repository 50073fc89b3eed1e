"""The laboratory: what must stay the same between two runs that are compared."""
