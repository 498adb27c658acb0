"""From a folder of pictures to captions, tags, metadata and caches: what the scripts in `finetune/` and `tools/` do."""
