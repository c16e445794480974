"""Consensus graphs of reasoning steps: build (in C++, csrc/graph), analyse, save, draw."""
