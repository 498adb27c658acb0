"""The dataset: its configuration, index, buckets, captions and pixels."""
