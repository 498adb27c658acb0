"""What is wrong with a dataset, found before a run: findings, statistics, a page with pictures."""
