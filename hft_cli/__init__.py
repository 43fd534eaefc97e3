"""hft: fine-tune language models without making them forget (Half Fine-Tuning, ACL 2025)."""
