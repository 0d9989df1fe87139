"""Other people's engines: what is specific to each, and nothing that the ops need."""
