"""The `compact` commands, one file each."""
