"""Bodies of requests to arrays: formats, image files, limits."""
