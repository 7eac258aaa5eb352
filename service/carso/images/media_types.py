"""The Content-Types of the bodies that the service reads."""

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
IMAGE_ALIASES = ("image/jpg", "image/x-ms-bmp", "image/x-png")
JSON = "application/json"
NPY = "application/x-npy"
MULTIPART = "multipart/form-data"
MEDIA_TYPES = (*IMAGE_TYPES, MULTIPART, JSON, NPY)
