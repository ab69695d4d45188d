"""A name becomes rows, and rows become conversations."""
