"""See the data as the model will."""
