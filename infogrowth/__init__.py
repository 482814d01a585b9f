"""Grow clean, diverse image–caption datasets and train BLIP on them (InfoGrowth, ECCV 2024)."""
