"""Who numbers, keeps and hands on what is published."""
