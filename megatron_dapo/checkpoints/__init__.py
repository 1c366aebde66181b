"""Checkpoints of a run: what lies where, when one is whole, when it is written and which is taken up."""
