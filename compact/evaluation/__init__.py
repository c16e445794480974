"""Evaluates students, rationales and weightings; the command line is in compact.commands."""
