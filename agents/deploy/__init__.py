"""Learned policies that leave the gym."""
