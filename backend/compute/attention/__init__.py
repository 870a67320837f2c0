"""Attention over a paged KV cache, called by transformers' models through AttentionInterface."""
