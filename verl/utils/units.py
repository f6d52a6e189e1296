"""Units in which sizes are shown."""

GIB = 2**30
