"""Measuring students, rationales and weightings: libraries without argparse."""
