"""What a run writes, and how runs are compared."""
