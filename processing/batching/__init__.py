"""Conversations become batches, and every sample is accounted for."""
