"""One protocol a file, each with `router(service)`."""
