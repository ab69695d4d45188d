"""What learns, how it is stepped, and what of it is on disk."""
