"""Instruction files in; prompt and response tokens, masks and rows out. No torch, no numpy.

read → template → mask → lengths, pack → batches. The plan asks for lengths, training for batches.
"""
