"""Artifact in, smaller artifact out, behind an accuracy gate."""
