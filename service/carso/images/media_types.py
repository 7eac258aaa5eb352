"""The Content-Types of the bodies that the service reads."""

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
IMAGE_ALIASES = ("image/jpg", "image/pjpeg", "image/x-png", "image/x-ms-bmp", "image/x-bmp")
# What clients send that were told nothing: curl --data-binary and wget --post-file the third
UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded", "binary/octet-stream")
JSON = "application/json"
NPY = "application/x-npy"
MULTIPART = "multipart/form-data"
NDJSON = "application/x-ndjson"  # lines of JSON, of a stream
MEDIA_TYPES = (*IMAGE_TYPES, MULTIPART, JSON, NPY)
