"""Federated fine-tuning of a PEFT model with fedrot on Flower: a template."""
