"""Deployment of learned policies outside the environments."""
