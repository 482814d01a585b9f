"""Dual encoders and captioners behind two small protocols, and what runs them over a whole pile."""
