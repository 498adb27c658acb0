"""What learns: which parameters, and how they are saved."""
