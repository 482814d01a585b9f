"""Dual encoders and captioners behind two protocols, and what runs them over a dataset."""
