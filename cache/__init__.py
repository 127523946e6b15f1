"""Paged KV memory: which block holds which tokens, who shares it, and what is remembered for later requests."""
