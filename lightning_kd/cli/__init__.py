"""The ``lightning-kd`` command; nothing is imported here, so that its commands are listed at once."""
