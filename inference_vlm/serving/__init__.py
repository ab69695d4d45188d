"""A model behind OpenAI's API: one model, loaded once, for people and programs that share it."""
