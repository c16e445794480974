"""The `compact` commands, one file per command."""
