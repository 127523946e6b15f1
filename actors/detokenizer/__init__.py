"""Sampled tokens to the text that each request may show."""
