"""The demo: small real photographs and a tiny model."""
