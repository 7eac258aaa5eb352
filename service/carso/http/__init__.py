"""The way in and out: connections, limits, keys, errors as HTTP answers."""
