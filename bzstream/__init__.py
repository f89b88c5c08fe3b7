"""The validator's HTTP node: zero-copy distribution of mixture-of-experts shards, submissions and evaluation."""
