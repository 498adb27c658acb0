"""The demonstration: a small model of drawn shapes, pictures of a new shape, and small real photographs."""
