"""What a worker does: one loop, its parts, and what keeps it alive."""
