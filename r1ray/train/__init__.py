"""Rows and a base in, an Artifact out: Ray Train workers that run TRL trainers on DeepSpeed."""
