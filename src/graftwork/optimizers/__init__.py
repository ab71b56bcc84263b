"""Optimisers that train whole weights with little state: AdamW on low-rank projections of the gradients."""
