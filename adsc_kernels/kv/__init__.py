"""KV caches that are already written: what describes one, what is checked of it, whose it is."""
