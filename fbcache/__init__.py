"""fbcache."""
