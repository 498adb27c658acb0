"""Model families: load, encode, condition, predict, save."""
