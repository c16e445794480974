"""Consensus graphs of reasoning steps: assembly (csrc/graph), reading, saving, drawing."""
