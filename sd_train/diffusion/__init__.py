"""Diffusion mathematics: small pure functions with the papers' symbols."""
